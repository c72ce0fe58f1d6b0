"""What TRL and transformers do otherwise: the head that evaluates, the precision in which weights are read again, and what
is read of a model that SFTTrainer loads by its name."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
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

from seecal import CALTrainer
from seecal.trainer.trl_compat import load_as_saved, patch_eval_head
from tests.support.planted import left_no, planted_module, planted_torch
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

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


# ---- a model given by its name, which SFTTrainer loads ----


@pytest.fixture
def folder(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "model")
    tiny_llava_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def by_name(folder, **changes):
    args = sgd_config(folder.parent / "run", 2, 1, **changes)
    return CALTrainer(str(folder), args, train_dataset=tiny_dataset(4)), args


def change(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize("options", [None, {"use_safetensors": True}, {"dtype": "bfloat16"}])
def test_a_model_by_its_name_is_read_from_safetensors_alone(folder, options):
    (folder / "model.safetensors").unlink()
    planted_torch(folder / "pytorch_model.bin", folder.parent / "mark")
    with pytest.raises(ValueError, match=r"model: its weights are pytorch_model\.bin, .*use_safetensors: false"):
        by_name(folder, model_init_kwargs=options)
    left_no(folder.parent / "mark")


def test_other_safetensors_beside_a_pickle_do_not_let_it_in(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    planted_torch(folder / "pytorch_model.bin", folder.parent / "mark")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        by_name(folder)
    left_no(folder.parent / "mark")


def test_pytorchs_file_is_read_where_it_is_asked_for_and_the_config_stays_the_callers(folder):
    weights = load_file(folder / "model.safetensors")
    this, args = by_name(folder)
    assert args.model_init_kwargs is None
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    asked = {"use_safetensors": False}
    other, args = by_name(folder, model_init_kwargs=asked)
    assert args.model_init_kwargs == asked == {"use_safetensors": False}
    assert all(torch.equal(one, other.model.get_parameter(name)) for name, one in this.model.named_parameters())


@pytest.mark.parametrize("part", [None, "text_config"])
def test_kernels_that_a_models_config_names_are_not_fetched(folder, part):
    kernel = "kernels-community/flash-attn2"
    change(folder / "config.json", attn_implementation=kernel if part is None else {part: kernel})
    with pytest.raises(ValueError, match=r"model: its config\.json asks for attn_implementation='kernels-comm.* a hub"):
        by_name(folder)
    by_name(folder, model_init_kwargs={"attn_implementation": "sdpa"})


def test_code_of_a_models_folder_runs_only_where_it_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.setattr("sys.path", sys.path.copy())
    mark = folder.parent / "mark"
    planted_module(folder / "planted.py", mark, ["Config"])
    change(folder / "config.json", model_type="planted", auto_map={"AutoConfig": "planted.Config"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        by_name(folder)
    left_no(mark)
    with pytest.raises(Exception):  # noqa: B017  # the planted class is no config
        by_name(folder, trust_remote_code=True)
    assert mark.exists()


def test_the_folder_of_an_adapter_is_no_model_by_its_name(folder):
    adapter = folder.parent / "adapter"
    get_peft_model(tiny_llava(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"adapter: an adapter's folder, .* Merge it first"):
        by_name(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"its weights are adapter_model\.bin"):
        by_name(adapter)


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
