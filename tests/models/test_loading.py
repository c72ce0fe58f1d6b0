"""Loading a model: whole or not at all, in the precision asked for, from the folder of an adapter too, never in silence."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from seecal.models.loading import account_for, load_processor, load_vlm
from seecal.recipes.trainable import LoraSettings, prepare
from tests.support.tiny import tiny_llava, tiny_llava_processor


@pytest.fixture
def folder(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "base")
    tiny_llava_processor().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("lost", ["lm_head", "multi_modal_projector.linear_1.weight", "layers.1.mlp.up_proj"])
def test_a_checkpoint_without_one_tensor_is_refused(folder, lost):
    """transformers would start it from random numbers, with a warning."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if lost in name and "vision" not in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 of the model's tensors, \S*{re.escape(lost)}\S* for one"):
        load_vlm(str(folder))


def with_more(folder, *names):
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{name: torch.ones(2) for name in names}}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ("language_model.lm_head.bias", "lm_head"),
        ("language_model.model.layers.0.self_attn.q_norm.weight", "model.language_model.layers.0.self_attn"),
        ("vision_tower.vision_model.encoder.layers.1.layer_scale", "model.vision_tower.encoder.layers.1"),
        ("multi_modal_projector.linear_3.weight", "model.multi_modal_projector"),
        ("language_model.model.layers.1.mlp.up_proj.lora_A.weight", "model.language_model.layers.1.mlp.up_proj"),
    ],
)
def test_a_tensor_of_a_part_that_does_not_read_it_is_refused(folder, more, place):
    """transformers would leave it out, and the model would be another one."""
    with_more(folder, more)
    with pytest.raises(
        ValueError, match=rf"its files have \S+, which belongs into {re.escape(place)} and which a Llava"
    ):
        load_vlm(str(folder), processor=False)


def test_parts_that_the_model_has_not_are_left_out_with_a_warning(folder, caplog):
    before = logits_of(load_vlm(str(folder), processor=False)[0])
    assert not caplog.records
    buffers = ["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"]  # transformers ignores it by itself
    scales = ["language_model.model.layers.0.self_attn.k_scale"]
    heads = [f"vision_tower.vision_model.head.{name}" for name in ("probe", "mlp.fc1.weight", "attention.in_proj_bias")]
    more = ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight", "language_model.model.layers.9.mlp.up_proj.weight"]
    with_more(folder, *buffers, *scales, *heads, *more, "image_newline")
    with caplog.at_level("WARNING", logger="seecal"):
        model = load_vlm(str(folder), processor=False)[0]
    (told,) = [one.getMessage() for one in caplog.records if one.name.startswith("seecal")]
    assert re.search(
        r"base: 8 tensors of its files are no part of a LlavaForC\w+ and are left out, \S+ for one\.$", told
    )
    assert torch.equal(logits_of(model), before)


def test_a_pooling_head_of_a_tower_in_another_librarys_class_is_left_out(caplog):
    network = torch.nn.ModuleDict({"timm_model": torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(2)})})
    with caplog.at_level("WARNING", logger="seecal"):
        account_for(["timm_model.head.fc.weight", "timm_model.attn_pool.q.weight"], network, "it")
    assert "it: 2 tensors of its files are no part of a ModuleDict" in caplog.text
    with pytest.raises(ValueError, match=r"timm_model\.norm\.scale, which belongs into timm_model\.norm"):
        account_for(["timm_model.norm.scale"], network, "it")


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_the_precision_is_that_of_the_file_or_the_one_asked_for(folder, saved):
    tiny_llava().to(saved).save_pretrained(folder)
    assert load_vlm(str(folder), processor=False)[0].dtype == saved
    for asked in ("float32", "bfloat16"):
        model, processor = load_vlm(str(folder), dtype=asked, processor=False)
        assert {one.dtype for one in model.parameters()} == {getattr(torch, asked)}
        assert not model.training
        assert processor is None


def test_a_model_that_takes_no_images_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a llama model takes no images"):
        load_vlm(str(tmp_path))


# ---- a processor alone ----


def test_a_processor_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert type(load_processor(str(folder))) is type(tiny_llava_processor())


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./none", "no such folder"),
        ("base/config.json", "this is a file"),
        ("empty", "no model in this folder"),
        ("words", "its processor cannot be loaded"),
        ("text", "no processor for images here, only a"),
        ("broken", "its processor cannot be loaded"),
    ],
)
def test_a_processor_that_is_not_there_is_one_line(path, words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "words")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "words" / name).unlink(missing_ok=True)
    shutil.copytree(tmp_path / "words", tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = json.loads((tmp_path / "text" / "tokenizer_config.json").read_text())
    tokenizer.pop("processor_class", None)
    (tmp_path / "text" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=words) as error:
        load_processor(path)
    assert "\n" not in str(error.value)


# ---- adapters ----


@pytest.fixture
def adapter(folder, tmp_path):
    """The folder of an adapter, as a run leaves it; the logits of the model with it."""
    prepared = prepare(load_vlm(str(folder))[0], ["projector", "lora"], LoraSettings(r=2)).model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, one in prepared.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.3)
    prepared.save_pretrained(tmp_path / "adapter")
    tiny_llava_processor().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits_of(prepared)


def logits_of(model):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("own_processor", [True, False])
def test_the_folder_of_an_adapter_is_the_model_with_it(adapter, folder, own_processor):
    path, expected = adapter
    if not own_processor:
        for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
            (path / name).unlink()
    model, processor = load_vlm(str(path))
    assert load_processor(str(path)).to_dict() == processor.to_dict()
    assert not model.training
    assert processor.chat_template == tiny_llava_processor().chat_template
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-3)
    base = logits_of(load_vlm(str(folder), processor=False)[0])
    assert float((base - expected).abs().max()) > 0.1, "the adapter matters"


def named(path, base):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))


@pytest.mark.parametrize("base", [None, "", "itself", "gone"])
def test_an_adapter_whose_model_is_not_there_says_where_it_is_named(adapter, base, tmp_path):
    path, _ = adapter
    named(path, {"itself": str(path), "gone": str(tmp_path / "gone")}.get(base, base))
    with pytest.raises(ValueError, match=r"base_model_name_or_path.*Write the folder of the model") as error:
        load_vlm(str(path))
    if base == "gone":
        assert "gone: no such folder" in str(error.value)


def test_an_adapter_of_another_model_is_one_line(adapter, tmp_path):
    path, _ = adapter
    tiny_llava(hidden_size=32).save_pretrained(tmp_path / "other")
    named(path, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="was not trained on"):
        load_vlm(str(path))


@pytest.mark.parametrize("lost", ["projector", "layers.0.self_attn.q_proj.lora_B", "layers.1.mlp.up_proj.lora_A"])
def test_an_adapter_without_a_tensor_is_refused(adapter, lost):
    path, _ = adapter
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if lost in name)]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not hold all that was trained"):
        load_vlm(str(path))


def test_a_broken_adapter_config_is_named(adapter):
    path, _ = adapter
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not valid JSON"):
        load_processor(str(path))
    with pytest.raises(ValueError, match=r"adapter_config\.json: not valid JSON"):
        load_vlm(str(path))


@pytest.mark.parametrize("kind", ["mgm", "mgm_gemma", "llava_llama", "llava"])
@pytest.mark.parametrize("load", [load_vlm, load_processor])
def test_a_checkpoint_in_the_originals_layout_is_sent_to_convert(tmp_path, kind, load):
    settings = {"model_type": kind, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="Run seecal convert on it"):
        load(str(tmp_path))


# ---- folders that hold a model further inside ----


@pytest.mark.parametrize(
    ("inside", "meant"),
    [
        (["stage-1/model", "final"], "final"),
        (["stage-1/model", "stage-2/checkpoint-20", "stage-2/checkpoint-9"], "stage-2/checkpoint-20"),
        (["stage-1/model", "stage-1/checkpoint-8"], "stage-1/model"),
        (["checkpoint-9", "checkpoint-100"], "checkpoint-100"),
        (["stage-2/checkpoint-3", "stage-10/checkpoint-1"], "stage-10/checkpoint-1"),
        (["run/final"], "run/final"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["config.json", "adapter_config.json"])
def test_a_runs_folder_names_its_newest_model(inside, meant, kind, tmp_path):
    for name in inside:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / kind).write_text("{}")
    with pytest.raises(ValueError, match=r"no config\.json here, but there is one in") as error:
        load_vlm(str(tmp_path))
    assert f"there is one in {tmp_path / meant}: give that folder" in str(error.value)


def test_a_checkpoint_in_shards_says_how_to_go_on(tmp_path):
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ValueError, match=r"shards of FSDP or DeepSpeed.*--resume.*final folder"):
        load_vlm(str(tmp_path))
    shutil.rmtree(tmp_path / "pytorch_model_fsdp_0")
    with pytest.raises(ValueError, match=r"no model in this folder: it has no config.json, and no adapter_config"):
        load_vlm(str(tmp_path))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_a_hub(path):
    with pytest.raises(ValueError, match=r"no such folder\. Give a model's folder, or a hub id"):
        load_vlm(path)
