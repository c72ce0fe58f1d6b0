"""seecal.build_start: a model of any tower and any language model, ready to train."""

import pytest
import torch
import transformers as hf
from PIL import Image

import seecal
from tests.support.tiny import tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "What?\n"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders by name: two language models and two towers, tiny, as the hub has them."""
    folder = tmp_path_factory.mktemp("parts")
    made = tiny_tokenizer()
    plain = {"tokenizer_object": made._tokenizer, "bos_token": "<s>", "eos_token": "<|end|>"}
    texts = {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(made), **SIZES)),
        "qwen": hf.Qwen2ForCausalLM(
            hf.Qwen2Config(vocab_size=len(made) + 70, num_key_value_heads=1, tie_word_embeddings=True, **SIZES)
        ),
    }
    for name, model in texts.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
        template = CHATML if name == "qwen" else None
        hf.PreTrainedTokenizerFast(**plain, chat_template=template).save_pretrained(folder / name)
    vision = {"image_size": 32, "patch_size": 8, **SIZES}
    hf.CLIPVisionModel(hf.CLIPVisionConfig(**vision)).save_pretrained(folder / "clip")
    siglip = hf.SiglipConfig(vision_config=vision, text_config={"vocab_size": 40, **SIZES})
    hf.SiglipModel(siglip).save_pretrained(folder / "siglip")
    return folder


def tokens_of(folder, size=(50, 20)):
    """(loaded model, the processor's batch for CHAT about an image of ``size``)."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder)
    processor = hf.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(CHAT)
    return model, processor, processor(text=text, images=Image.new("RGB", size), return_tensors="pt")


@pytest.mark.parametrize("text", ["llama", "qwen"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_it_is_a_model_to_train(family, text, vision, parts, tmp_path):
    out = seecal.build_start(family, str(parts / text), str(parts / vision), tmp_path / "start")
    model, processor, batch = tokens_of(out)
    before = hf.AutoModelForCausalLM.from_pretrained(parts / text)
    rows = before.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    assert model(**batch).logits.isfinite().all(), "features and image tokens are as many"
    grown = model.get_input_embeddings().weight
    assert torch.equal(grown[: len(rows)], rows)
    assert len(grown) >= len(processor.tokenizer)
    assert len(grown) % 64 == 0 or len(grown) == len(rows)
    tower = hf.AutoModel.from_pretrained(parts / vision)
    tower = getattr(tower, "vision_model", tower).to(torch.bfloat16)
    theirs = dict(tower.named_parameters())
    ours = dict(model.model.vision_tower.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert processor.image_processor.image_mean[0] == (0.5 if vision == "siglip" else pytest.approx(0.4814, abs=1e-4))
