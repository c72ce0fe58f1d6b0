"""What TRL and transformers do otherwise: the head that evaluates, and the precision in which weights are read again."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)
from trl.trainer.utils import add_fused_lm_head

from seecal.trainer.trl_compat import load_as_saved, patch_eval_head
from tests.support.tiny import tiny_llava

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
VISION = SiglipVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8,
    vision_use_head=False,
)  # fmt: skip


def gemma3():
    text = Gemma3TextConfig(**TEXT, final_logit_softcapping=1.0)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=16))


def aya():
    text = Cohere2Config(**{key: TEXT[key] for key in TEXT if key != "head_dim"}, logit_scale=0.25)
    return AyaVisionForConditionalGeneration(
        AyaVisionConfig(text_config=text, vision_config=VISION, downsample_factor=2)
    )


@pytest.mark.parametrize("build", [gemma3, aya])
def test_the_fused_head_is_the_classs(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    ids = torch.randint(5, 60, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if "token_type_ids" in type(model).forward.__wrapped__.__code__.co_varnames:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    with torch.no_grad():
        logits = model(**{**inputs, "labels": None}).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        read_from_the_config = model(**inputs, fused_lm_head=True).loss
        before = model.config.get_text_config().to_dict()
        patch_eval_head(model)
        got = model(**inputs, fused_lm_head=True).loss
    assert abs(float(read_from_the_config - expected)) > 1e-2, "TRL reads it right by itself now: this can go"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert model.config.get_text_config().to_dict() == before


def widened(model, kind):
    """A model of bfloat16 of which something was made wider, as fine-tuning scripts do, and trained a little."""
    if kind == "all of it":
        model.float()
    elif kind == "its projector":
        model.model.multi_modal_projector.float()
    elif kind == "its head, in float64":
        model.lm_head.double()
    return model


@pytest.mark.parametrize("kind", ["nothing", "all of it", "its projector", "its head, in float64"])
def test_weights_are_read_again_to_the_last_bit(tmp_path, kind):
    tiny_llava().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    one, other = (
        widened(AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.bfloat16), kind)
        for _ in range(2)
    )
    with torch.no_grad():
        for value in one.parameters():
            value.add_(torch.randn_like(value) * 1e-4)
    one.save_pretrained(tmp_path / "checkpoint")
    other.config.dtype = torch.bfloat16
    load_as_saved(other, str(tmp_path / "checkpoint"))
    read = other.state_dict()
    for name, value in one.state_dict().items():
        assert read[name].dtype == value.dtype, name
        assert torch.equal(read[name], value), name
    assert other.config.dtype == torch.bfloat16, "the config is as it was"
    assert other.config.text_config.dtype == one.config.text_config.dtype
