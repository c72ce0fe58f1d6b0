"""Processors for models whose folder is not there: each family's own classes and image settings, a small tokenizer made in
process, and a chat template in the shape of the published one.

A family is one row in :data:`PROCESSORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import transformers as hf

from ..data.chat_templates import TEMPLATES, chat_template
from ..data.image_placement import PLACEHOLDER
from .assembly import llava_processor

VOCABULARY = 4096  # at most, before the special tokens
_TEXT = "What is in this picture? How many are there, and where? It is a red square beside a blue circle. Two.\n\n"


@dataclass(frozen=True)
class StandIn:
    """A processor, and the ids of its special tokens by the names that its family's configuration has for them."""

    processor: Any
    ids: dict[str, int]


def stand_in_processor(config: Any, texts: Iterable[str] = ()) -> StandIn:
    """The processor of the family of ``config``, with the real image settings.

    Args:
        config: in real size; image and patch size, grid and number of image tokens are taken from it.
        texts: what the tokenizer is trained on beside a few words of ours, so that it cuts them as coarsely as a large one.

    Raises:
        ValueError: a family without a row in :data:`PROCESSORS`.
    """
    if config.model_type not in PROCESSORS:
        raise ValueError(
            f"there is no processor for a {config.model_type} model here. Give the model's folder with its processor, "
            f"or one of {', '.join(sorted(PROCESSORS))}"
        )
    # Templates too: their words would otherwise be cut into letters, and a system prompt be longer than it is
    written = [chat_template(name) for name in TEMPLATES]
    return PROCESSORS[config.model_type](config, _trained([_TEXT, *written, *texts] * 2))


def _trained(texts: Iterable[str]) -> str:
    """A byte-level BPE tokenizer without a special token, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _tokenizer(
    trained: str,
    *special: str,
    pad: str = "<pad>",
    bos: str | None = None,
    eos: str,
    begins: bool = False,
    **named: str,
) -> Any:
    """With these special tokens. ``begins``: it puts ``bos`` before a text. Processors read ``named`` off it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained),
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=list(special),
        model_specific_special_tokens=named,
        padding_side="right",
    )
    if begins:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, made.bos_token_id)]
        )
    return made


def _stand_in(processor: Any, **tokens: str) -> StandIn:
    """With the ids of ``tokens`` by their names in the configuration."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    ids |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    return StandIn(processor, ids)


def _side(size: Any) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size


# ---- Chat templates, as the families publish them ----

_PARTS = (
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '%s' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
)


def _chatml(image: str) -> str:
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        + _PARTS.replace("%s", image.replace("\n", "\\n"))
        + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


_UTTERANCES = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    + _PARTS.replace("%s", PLACEHOLDER)
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<start_of_image>' }}{% else %}"
    "{{ part.text | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


# ---- Processors ----


def _llava(config: Any, trained: str) -> StandIn:
    tokenizer = _tokenizer(trained, PLACEHOLDER, bos="<s>", eos="</s>", begins=True)
    anyres = config.model_type == "llava_next"
    processor = llava_processor(
        tokenizer,
        side=_side(config.vision_config.image_size),
        patch=_side(config.vision_config.patch_size),
        images="anyres" if anyres else "pad",
        template=chat_template("vicuna_v1"),
        strategy=config.vision_feature_select_strategy,
        grid=config.image_grid_pinpoints if anyres else None,
    )
    return _stand_in(processor, image_token_id=PLACEHOLDER)


def _mgm(config: Any, trained: str) -> StandIn:
    from .mgm import MGMProcessor

    gemma, side = config.text_config.model_type == "gemma", config.image_size_aux
    named = {"bos": "<bos>", "eos": "<eos>"} if gemma else {"bos": "<s>", "eos": "</s>"}
    marks = (PLACEHOLDER, "<start_of_turn>", "<end_of_turn>") if gemma else (PLACEHOLDER,)
    images = hf.LlavaImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=True
    )
    processor = MGMProcessor(
        images,
        _tokenizer(trained, *marks, begins=True, **named),
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        image_grid=config.image_grid,
        image_global=config.image_global,
        chat_template=chat_template("gemma" if gemma else "vicuna_v1"),
    )
    return _stand_in(processor, image_token_id=PLACEHOLDER)


def _qwen3_vl(config: Any, trained: str) -> StandIn:
    vision = config.vision_config
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(trained, "<|im_start|>", *marks, pad="<|endoftext|>", eos="<|im_end|>")
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    pixels = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    half: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**sizes, **half, size=pixels),
        tokenizer,
        hf.Qwen3VLVideoProcessor(**sizes),
        chat_template=_chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    start, end, image, video = marks
    return _stand_in(
        processor, image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end
    )


def _internvl(config: Any, trained: str) -> StandIn:
    side = _side(config.vision_config.image_size)
    size = {"height": side, "width": side}
    marks: dict[str, Any] = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokenizer = _tokenizer(
        trained, "<|im_start|>", pad="<|endoftext|>", eos="<|im_end|>", **marks, video_token="<video>"
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=12),
        tokenizer,
        hf.InternVLVideoProcessor(size=size),
        image_seq_length=config.image_seq_length,
        chat_template=_chatml("<IMG_CONTEXT>\n"),
    )
    return _stand_in(processor, image_token_id="<IMG_CONTEXT>")


def _smolvlm(config: Any, trained: str) -> StandIn:
    side, patch = _side(config.vision_config.image_size), _side(config.vision_config.patch_size)
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = (PLACEHOLDER, "<fake_token_around_image>", "<global-img>", *tiles)
    tokenizer = _tokenizer(trained, *marks, pad="<|im_end|>", bos="<|im_start|>", eos="<end_of_utterance>")
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side}),
        tokenizer,
        hf.SmolVLMVideoProcessor(size={"longest_edge": side}),
        image_seq_len=(side // patch) ** 2 // config.scale_factor**2,
        chat_template=_UTTERANCES,
    )
    return _stand_in(processor, image_token_id=PLACEHOLDER)


def _paligemma(config: Any, trained: str) -> StandIn:
    """Published without a chat template: one question, one answer."""
    side, patch = _side(config.vision_config.image_size), _side(config.vision_config.patch_size)
    images: Any = hf.SiglipImageProcessor(size={"height": side, "width": side})
    images.image_seq_length = (side // patch) ** 2
    tokenizer = _tokenizer(trained, PLACEHOLDER, bos="<bos>", eos="<eos>", begins=True)
    return _stand_in(hf.PaliGemmaProcessor(images, tokenizer), image_token_id=PLACEHOLDER)


def _gemma3(config: Any, trained: str) -> StandIn:
    side = _side(config.vision_config.image_size)
    begin, end, soft = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
    marks = {"boi_token": begin, "eoi_token": end, "image_token": soft}
    tokenizer = _tokenizer(trained, "<start_of_turn>", bos="<bos>", eos="<end_of_turn>", begins=True, **marks)
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": side, "width": side}),
        tokenizer,
        image_seq_length=config.mm_tokens_per_image,
        chat_template=_GEMMA,
    )
    return _stand_in(processor, image_token_id=soft, boi_token_id=begin, eoi_token_id=end)


PROCESSORS: dict[str, Callable[[Any, str], StandIn]] = {
    "llava": _llava,
    "llava_next": _llava,
    "mgm": _mgm,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}
