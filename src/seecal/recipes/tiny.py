"""What the recipe ``tiny`` trains: a tiny LLaVA, its processor and records about coloured squares.

All of it is built in process, so everything runs offline in seconds.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

IMAGE_SIZE, PATCH = 32, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2

# Every turn is "<|start|>role\n...<|end|>\n", an image is one "<image>", which the processor multiplies.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

_COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["What colour is it? It is red. It is green. It is blue. It is yellow. user assistant system a b c"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "<image>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str = CHAT_TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens; ``<|end|>`` ends every turn."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=["<image>", "<|start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llava_processor(chat_template: str = CHAT_TEMPLATE) -> transformers.LlavaProcessor:
    """32 × 32 pixels, 16 image tokens an image."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def tiny_llava(seed: int = 0, *, scale: float = 6.0, **text: Any) -> transformers.LlavaForConditionalGeneration:
    """A LLaVA of about 0.1 M parameters, two layers in either half.

    Its weights are ``scale`` times the usual ones: at the usual scale the image hardly moves a logit and every Δ is below
    α, so that CAL would be the plain loss.
    """
    tokenizer = tiny_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, **text}
    decoder = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **sizes, **ids
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=IMAGE_TOKENS,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    return model


def tiny_image(colour: str, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> PILImage.Image:
    return PILImage.new("RGB", size, _COLOURS[colour])


def tiny_records(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """``n`` conversations about one colour each, of uneven length; every fifth has no image."""
    choose = random.Random(seed)
    records = []
    for index in range(n):
        colour = choose.choice(sorted(_COLOURS))
        answer = f"It is {colour}." + " It is." * choose.randrange(4)
        images = [] if index % 5 == 4 else [tiny_image(colour)]
        messages = [
            {"role": "user", "content": "What colour is it?" + " b" * choose.randrange(6)},
            {"role": "assistant", "content": answer},
        ]
        records.append({"id": f"r{index}", "messages": messages, "images": images})
    return records


def tiny_dataset(n: int, seed: int = 0) -> Dataset:
    """:func:`tiny_records` as a ``datasets`` set: columns id, messages, images."""
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"id": Value("string"), "messages": [message], "images": Sequence(Image())})
    return Dataset.from_list(tiny_records(n, seed), features=features)


def tiny_folder(folder: str | Path = "out/tiny") -> Path:
    """Write the model and data sets of the recipe ``tiny``: FOLDER/model, data.json (64 records in LLaVA's format),
    eval.json (12) and their images. What is there already is written over. Returns the folder.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    tiny_llava().save_pretrained(folder / "model")
    tiny_llava_processor().save_pretrained(folder / "model")
    _write_records(folder / "data.json", 64, seed=0)
    _write_records(folder / "eval.json", 12, seed=1)
    return folder


def _write_records(path: Path, count: int, seed: int) -> None:
    rows = []
    for record in tiny_records(count, seed):
        row = {"id": record["id"]}
        user, assistant = (message["content"] for message in record["messages"])
        for number, image in enumerate(record["images"]):
            row["image"] = f"images/{path.stem}-{record['id']}-{number}.png"
            image.save(path.parent / row["image"])
            user = "<image>\n" + user
        row["conversations"] = [{"from": "human", "value": user}, {"from": "gpt", "value": assistant}]
        rows.append(row)
    path.write_text(json.dumps(rows, indent=1))
