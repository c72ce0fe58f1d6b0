"""What in a model's folder could run code, or fetch some: refused by name, before anything is loaded."""

import contextlib
import json
import shutil

import jinja2
import pytest
import torch
from safetensors.torch import load_file

from seecal.models.export import merge
from seecal.models.loading import load_vlm
from seecal.recipes.trainable import LoraSettings, prepare
from seecal.scoring.run import _with_adapter
from tests.support.planted import left_no, planted_module, planted_pickle, planted_torch
from tests.support.tiny import tiny_llava, tiny_llava_processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_llava().save_pretrained(folder / "base")
    tiny_llava_processor().save_pretrained(folder / "base")
    prepared = prepare(load_vlm(str(folder / "base"))[0], ["lora"], LoraSettings(r=2)).model
    prepared.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved / "base", tmp_path / "base")
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def change(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


# ---- weights ----


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
@pytest.mark.parametrize("kind", [planted_pickle, planted_torch])
def test_weights_that_are_no_safetensors_are_refused(folder, name, kind):
    base, mark = folder / "base", folder / "mark"
    (base / "model.safetensors").unlink()
    kind(base / name, mark)
    with pytest.raises(ValueError, match=rf"base: its weights are {name}, a PyTorch file, .*use_safetensors: false"):
        load_vlm(str(base))
    left_no(mark)


def test_they_are_read_where_they_are_asked_for_and_run_nothing(folder):
    base = folder / "base"
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    model, _ = load_vlm(str(base), use_safetensors=False)
    assert torch.equal(
        model.lm_head.weight,
        weights["lm_head.weight" if "lm_head.weight" in weights else "language_model.lm_head.weight"],
    )
    for kind in (planted_pickle, planted_torch):
        kind(base / "pytorch_model.bin", folder / "mark")
        with pytest.raises(Exception):  # noqa: B017  # torch's own, whichever it is
            load_vlm(str(base), use_safetensors=False)
        left_no(folder / "mark")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "other.safetensors"])
def test_a_pickle_beside_other_safetensors_is_not_taken_in_their_stead(folder, name):
    base = folder / "base"
    (base / "model.safetensors").rename(base / name)
    torch.save(load_file(base / name), base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"base: cannot be loaded: .*model.safetensors"):
        load_vlm(str(base))


def test_pickles_beside_safetensors_are_not_touched(folder):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        planted_pickle(folder / "base" / name, folder / "mark")
    load_vlm(str(folder / "base"))
    left_no(folder / "mark")


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../base/model.safetensors", "/etc/model.safetensors", None, 7])
def test_an_index_that_leads_out_of_the_folder_or_to_a_pickle(folder, shard):
    base = folder / "base"
    names = list(load_file(base / "model.safetensors"))
    (base / "model.safetensors").unlink()
    planted_torch(base / "pytorch_model.bin", folder / "mark")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: it names .* which is no .safetensors file of this folder"):
        load_vlm(str(base))
    left_no(folder / "mark")


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", '{"weight_map": ["a"]}', "hello"])
def test_an_index_that_is_none(folder, text):
    (folder / "base" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json: (not valid JSON|it names None)"):
        load_vlm(str(folder / "base"))


def test_a_config_that_names_its_weights(folder):
    planted_torch(folder / "base" / "adapter_model.bin", folder / "mark")
    change(folder / "base" / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(ValueError, match=r"config.json names 'adapter_model.bin' as its weights"):
        load_vlm(str(folder / "base"))
    left_no(folder / "mark")


# ---- code ----


CLASSES = ["AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor"]


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_in_the_folder_is_not_run(folder, file):
    """The family is one of transformers: its own classes are taken."""
    base, mark = folder / "base", folder / "mark"
    names = ["Config", "Model", "Processor", "Tokenizer", "ImageProcessor"]
    planted_module(base / "planted.py", mark, names)
    auto_map = {auto: f"planted.{name}" for auto, name in zip(CLASSES, names, strict=True)}
    change(base / file, auto_map=auto_map)
    assert type(load_vlm(str(base))[0]).__module__.startswith("transformers.")
    left_no(mark)


@pytest.mark.parametrize("where", ["planted", "someone/repo--planted"])
def test_a_family_that_only_code_knows_is_refused_in_one_line(folder, where):
    base, mark = folder / "base", folder / "mark"
    planted_module(base / "planted.py", mark, ["Config"])
    change(base / "config.json", model_type="planted", auto_map={"AutoConfig": f"{where}.Config"})
    with pytest.raises(ValueError, match=r"base: it works only with custom code") as told:
        load_vlm(str(base))
    assert "\n" not in str(told.value)
    left_no(mark)


def test_code_cannot_be_asked_for(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_vlm(str(folder / "base"), trust_remote_code=True)


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("attention", ["kernels-community/flash-attn2", "someone/kernel@main:mha"])
def test_kernels_of_a_hub_are_not_fetched(folder, part, attention):
    asked = attention if part is None else {part: attention}
    change(folder / "base" / "config.json", attn_implementation=asked)
    with pytest.raises(ValueError, match=r"asks for attn_implementation=.* machine code from a hub"):
        load_vlm(str(folder / "base"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch mark') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__.__builtins__.open('mark', 'w') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('touch mark') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_reaches_nothing(folder, monkeypatch, template):
    monkeypatch.chdir(folder)
    (folder / "base" / "chat_template.jinja").write_text(template)
    processor = load_vlm(str(folder / "base"))[1]
    with pytest.raises((jinja2.exceptions.TemplateError, TypeError)):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "a"}]}], tokenize=False)
    left_no(folder / "mark")


# ---- adapters ----


def all_ways(folder):
    """The three functions that put an adapter on a model."""
    model, _ = load_vlm(str(folder / "base"), processor=False)
    return [
        lambda: load_vlm(str(folder / "adapter"), processor=False),
        lambda: _with_adapter(model, folder / "adapter"),
        lambda: merge(folder / "adapter", folder / "out", base=str(folder / "base")),
    ]


def test_an_adapter_that_is_no_safetensors_is_refused(folder):
    for kind in (planted_pickle, planted_torch):
        (folder / "adapter" / "adapter_model.safetensors").unlink(missing_ok=True)
        kind(folder / "adapter" / "adapter_model.bin", folder / "mark")
        for load in all_ways(folder):
            with pytest.raises(ValueError, match=r"its weights are adapter_model.bin, a PyTorch file"):
                load()
    left_no(folder / "mark")


def test_an_adapter_beside_a_models_weights_is_looked_at_too(folder):
    """transformers puts it on the model by itself."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "adapter" / name, folder / "base" / name)
    assert hasattr(load_vlm(str(folder / "base"), processor=False)[0], "peft_config")
    (folder / "base" / "adapter_model.safetensors").unlink()
    planted_torch(folder / "base" / "adapter_model.bin", folder / "mark")
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match=r"base: its weights are adapter_model.bin, a PyTorch file"):
            load_vlm(str(folder / "base"), processor=False, **options)
    left_no(folder / "mark")


def test_an_adapter_without_weights_is_not_looked_for_on_a_hub(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    for load in all_ways(folder):
        with pytest.raises(ValueError, match=r"no adapter_model.safetensors here"):
            load()


@pytest.mark.parametrize("kind", ["XLORA", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_an_adapter_that_leads_to_other_files(folder, kind):
    change(folder / "adapter" / "adapter_config.json", peft_type=kind)
    for load in all_ways(folder):
        with pytest.raises(ValueError, match=rf"a {kind} adapter, whose config names more to load"):
            load()


def test_an_adapter_does_not_import_what_it_names(folder, monkeypatch):
    planted_module(folder / "planted_core.py", folder / "mark", [])
    monkeypatch.syspath_prepend(folder)
    config = {"megatron_config": {"a": 1}, "megatron_core": "planted_core"}
    change(folder / "adapter" / "adapter_config.json", auto_mapping={"parent_library": "planted_core"}, **config)
    for load in all_ways(folder):
        with contextlib.suppress(ValueError):  # PEFT has megatron's own name allowed, and no other
            load()
    left_no(folder / "mark")
