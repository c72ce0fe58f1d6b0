"""Recipes: what wins over what, types, unknown keys, the shipped files, and a help that knows every field."""

import dataclasses
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from seecal import CALConfig
from seecal.recipes import accelerate_config
from seecal.recipes.help import config_fields, text
from seecal.recipes.recipe import KEYS, NOT_HERE, arguments, read
from seecal.recipes.schema import Text, checked
from seecal.recipes.trainable import LoraSettings
from seecal.trainer.cal_config import CALConfig as Config
from tests.support.processes import environment, limit

BASE = {"model": "m", "data": "d.json", "output_dir": "out"}
STAGES = [{"learning_rate": 1e-3, "train": "projector"}, {"beta": 4, "data": ["a.json", "b.json"]}]


@pytest.fixture
def recipe(tmp_path):
    """(settings, command line) → the recipe read from a file."""

    def make(settings, *argv):
        file = tmp_path / "recipe.yaml"
        file.write_text(settings if isinstance(settings, str) else yaml.safe_dump({**BASE, **settings}))
        return read(str(file), arguments(argv))

    return make


def test_what_wins_over_what(recipe):
    settings = {"learning_rate": 5e-5, "alpha": 0.5, "stages": STAGES}
    first, second = recipe(settings).stages
    assert [one.settings["learning_rate"] for one in (first, second)] == [1e-3, 5e-5]
    assert (first.train, second.train) == (("projector",), ("projector", "language_model"))
    assert [one.settings.get("beta") for one in (first, second)] == [None, 4.0]
    assert [[source.path for source in one.data] for one in (first, second)] == [["d.json"], ["a.json", "b.json"]]
    first, second = recipe(settings, "--learning_rate", "1e-5", "--stages.2.learning_rate=2e-5", "--alpha", "0").stages
    assert [one.settings["learning_rate"] for one in (first, second)] == [1e-5, 2e-5]
    assert [one.settings["alpha"] for one in (first, second)] == [0.0, 0.0]


def test_the_command_line_alone():
    line = "--model m --data a.json b.json --output-dir out --use_cpu --train projector lora"
    only = read(None, arguments(shlex.split(line)))
    assert only.model == "m"
    (stage,) = only.stages
    assert [one.path for one in stage.data] == ["a.json", "b.json"]
    assert stage.settings["use_cpu"] is True
    assert stage.train == ("projector", "lora")
    assert stage.lora == LoraSettings()


def test_inside_mappings(recipe):
    settings = {"lora": {"r": 8}, "learning_rates": {"projector": 1e-3}}
    argv = ["--lora.r", "64", "--lora.target", "[language_model, vision_tower]", "--learning_rates.lora", "2e-4"]
    (stage,) = recipe(settings, *argv).stages
    assert stage.lora == LoraSettings(r=64, target=["language_model", "vision_tower"])
    assert stage.train == ("projector", "lora")
    assert stage.learning_rates == {"projector": 1e-3, "lora": 2e-4}
    settings = {"data": [{"path": "a.json", "image_root": "img", "weight": 3}, {"path": "b", "weight": 1}]}
    (stage,) = recipe(settings).stages
    assert [(one.path, one.image_root, one.weight) for one in stage.data] == [("a.json", "img", 3.0), ("b", None, 1.0)]


def test_inside_mappings_at_any_depth(recipe):
    settings = {"model_init_kwargs": {"dtype": "bfloat16", "quantization_config": {"load_in_4bit": False}}, "lora": {}}
    argv = ["--model_init_kwargs.quantization_config.load_in_4bit", "true"]
    argv += [
        "--model_init_kwargs.quantization_config.bnb_4bit_quant_type=nf4",
        "--stages.1.processor_kwargs.size.a.b",
        "8",
    ]
    one = recipe({**settings, "stages": [{}]}, *argv)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert one.model_init_kwargs == {"dtype": "bfloat16", "quantization_config": four}
    assert one.stages[0].settings["processor_kwargs"] == {"size": {"a": {"b": 8}}}
    assert yaml.safe_load(one.to_yaml())["model_init_kwargs"] == one.model_init_kwargs


@pytest.mark.parametrize(("settings", "argv"), [({"lora": {}}, []), ({}, ["--lora", "{}"]), ({"lora": {"r": 16}}, [])])
def test_adapters_with_their_defaults_are_adapters(recipe, settings, argv):
    (stage,) = recipe(settings, *argv).stages
    assert stage.train == ("projector", "lora")
    assert stage.lora == LoraSettings()


def test_a_rate_of_its_own_for_all_that_trains_leaves_none_for_the_common_one(recipe):
    (stage,) = recipe({"train": "projector", "learning_rate": 0, "learning_rates": {"projector": 1e-3}}).stages
    assert stage.learning_rates == {"projector": 1e-3}
    assert recipe({"num_train_epochs": 0, "max_steps": 5}).stages[0].settings["max_steps"] == 5


def test_the_config_of_a_stage_goes_through_trls_parser(recipe, tmp_path):
    settings = {"use_cpu": True, "bf16": False, "save_strategy": False, "padding_free": True, "report_to": "none"}
    config = recipe(
        "\n".join(f"{name}: {value}" for name, value in {**BASE, **settings, "learning_rate": "1e-5"}.items())
    )
    config = config.stages[0].config(tmp_path / "stage-1")
    assert isinstance(config, CALConfig)
    assert config.learning_rate == 1e-5, "YAML reads 1e-5 as text"
    assert config.save_strategy.value == "no", "YAML reads no as false"
    assert config.padding_free is True
    assert config.output_dir == str(tmp_path / "stage-1")


def test_bad_records_are_treated_alike_when_they_are_loaded_and_when_their_batch_is_made(recipe, tmp_path):
    cpu = {"use_cpu": True, "bf16": False}
    for settings, expected in (({}, "error"), ({"on_bad": "skip"}, "skip")):
        (stage,) = recipe({**cpu, **settings}).stages
        assert stage.on_bad == stage.config(tmp_path).on_bad == expected


def test_the_resolved_recipe_is_a_recipe_with_nothing_left_to_merge(recipe, tmp_path):
    one = recipe({"bf16": False, "alpha": 0.5, "stages": STAGES}, "--stages.1.beta", "3")
    (tmp_path / "resolved.yaml").write_text(one.to_yaml())
    again = read(str(tmp_path / "resolved.yaml"))
    assert again == one
    assert again.resolved == one.resolved
    assert again.resolved["stages"][1]["train"] == ["projector", "language_model"]


@pytest.mark.parametrize(
    ("settings", "argv", "message"),
    [
        ({"learning_rat": 1}, [], "learning_rat: no such key. Did you mean learning_rate?"),
        ({"qqqq": 1}, [], "qqqq: no such key. seecal train --help-all"),
        ({"stages": [{"bta": 1}]}, [], "stages.1.bta: no such key. Did you mean beta?"),
        ({"lora": {"rank": 1}}, [], "lora.rank: no such key"),
        ({"data": {"pth": "x"}}, [], "data.pth: no such key. Did you mean path?"),
        ({"data": {"format": "llava"}}, [], "an entry without path"),
        ({"data": [{"path": "a", "weight": 1}, "b"]}, [], "give every entry a weight, or none"),
        ({"train": "projectr"}, [], "train: projectr: no such group. Did you mean projector?"),
        ({"learning_rates": {"tower": 1e-5}}, [], "learning_rates: tower: no such group"),
        ({"max_steps": 1.5}, [], "max_steps: expected a whole number, got 1.5"),
        ({"learning_rate": "fast"}, [], "learning_rate: expected a number, got 'fast'"),
        ({"learning_rate": float("nan")}, [], "learning_rate: expected a number, got nan"),
        ({"use_cpu": 3}, [], "use_cpu: expected true or false, got 3"),
        ({"model": 7}, [], "model: expected text, got 7 (put it in quotes)"),
        ({"lr_scheduler_type": "cosinus"}, [], "lr_scheduler_type: expected one of linear, cosine, "),
        ({"stages": {"a": 1}}, [], "stages: expected a list of mappings"),
        ({"stages": [{"model": "x"}]}, [], "stages.1.model: model holds for all stages"),
        ({"stages": STAGES}, ["--stages.2.bf16", "true"], "stages.2.bf16: bf16 holds for all stages"),
        ({"name": "x"}, [], "name belongs into an entry of stages"),
        ({"stages": STAGES}, ["--stages.0.beta", "3"], "with N from 1 to 2"),
        ({"stages": STAGES}, ["--stages.3.beta", "3"], "with N from 1 to 2"),
        ({}, ["--stages.1.beta", "3"], "this recipe has no stages"),
        ({}, ["beta", "3"], "unexpected argument 'beta'"),
        ({"model": ""}, [], "model is not set"),
        ({"data": []}, [], "data is not set"),
        ({"streaming": True}, [], "streaming has no known end: set max_steps"),
        (
            {"streaming": True, "max_steps": 2, "train_sampling_strategy": "group_by_length"},
            [],
            "train_sampling_strategy: a stream is read in its order",
        ),
        ({"max_steps": 0}, [], "max_steps=0: expected 1 or more, or -1"),
        ({}, ["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0: expected 1 or more"),
        ({}, ["--per_device_train_batch_size", "-1"], "per_device_train_batch_size=-1: expected 1 or more"),
        ({"num_train_epochs": 0}, [], "num_train_epochs=0.0: the stage would take no step"),
        (
            {"stages": [{}, {"num_train_epochs": -1}]},
            [],
            "stage 2: num_train_epochs=-1.0: the stage would take no step",
        ),
        ({"learning_rate": 0}, [], "learning_rate=0.0: projector, language_model would not move"),
        ({"train": "projector"}, ["--learning_rate", "-1e-5"], "learning_rate=-1e-05: projector would not move"),
        ({"learning_rates": {"projector": 0}}, [], "learning_rates: projector=0.0: projector would not move"),
        ({"lora": {"alpha": 0}}, [], "lora.alpha=0: the adapters' output is multiplied by it"),
        ({"lora": {"alpha": -16}}, [], "lora.alpha=-16: the adapters' output is multiplied by it"),
        ({"lora": {"r": 0}}, [], "lora.r=0: the rank must be at least 1"),
        ({"train": []}, [], "train=[]: nothing would train"),
        ({"train": ""}, [], "train='': nothing would train"),
        ({"stages": [{}, {}]}, ["--stages.2.train", "[]"], "stage 2: train=[]: nothing would train"),
        ({"lora": {"r": 4}, "train": "projector"}, [], "lora is set, but train is projector"),
        ({"lora": {}, "train": "projector"}, [], "lora is set, but train is projector"),
        ({"data": ["a", "b"]}, ["--data.1.path", "c"], "data is ['a', 'b'], not a mapping. Set --data as a whole"),
        ({"lora": {"r": 4}}, ["--lora.r.most", "8"], "lora.r is 4, not a mapping. Set --lora.r as a whole"),
        ({}, ["--model.path", "m"], "model is 'm', not a mapping"),
        ({"freeze": "embedding"}, [], "freeze: embedding: no such part. Did you mean embeddings?"),
        ({"freeze": "embeddings", "train": "projector"}, [], "they do not train anyway. Take freeze out"),
        (
            {"cache_vision_features": True, "train": ["projector", "vision_tower"]},
            [],
            "cache_vision_features, but the vision_tower trains",
        ),
        (
            {"cache_vision_features": True, "lora": {"target": ["language_model", "vision_tower"]}},
            [],
            "cache_vision_features, but the vision_tower trains",
        ),
        ({"trust_remote_code": True}, [], "trust_remote_code cannot be set here"),
        ({"resume_from_checkpoint": "x"}, [], "continue a run with --resume"),
        ({"chat_template": "none.jinja"}, [], "none.jinja: no such file"),
        ("model: [", [], "not valid YAML"),
        ("- a\n- b", [], "expected keys and values"),
        ("model: m\nmodel: n", [], "model is set twice"),
    ],
)
def test_mistakes_are_named(recipe, settings, argv, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        recipe(settings, *argv)
    assert message in " ".join(str(error.value).split())


def test_a_config_that_is_not_there_lists_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*llava-1\.5-7b, llava-next-13b, llava-next-7b,.*tiny"):
        read("none.yaml")
    with pytest.raises(FileNotFoundError, match="this is a folder"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (Text("8"), int | str | None, 8),
        (Text("max_length"), int | str | None, "max_length"),
        (Text("null"), int | None, None),
        (Text("Yes"), bool | None, True),
        (Text("{a: 1}"), dict | str | None, {"a": 1}),
        (Text("ds.json"), dict | str | None, "ds.json"),
        (Text("[a, b]"), str | list[str], ["a", "b"]),
        (Text("a"), list[str], ["a"]),
        (1, float, 1.0),
        ("1e3", float, 1000.0),
        ({"x": "1e-4"}, dict[str, float], {"x": 1e-4}),
    ],
)
def test_types(value, hint, expected):
    found = checked("key", value, hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_launch_configurations_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(accelerate_config(name)))
    kinds = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert found.distributed_type == kinds[name]
    assert found.mixed_precision == "bf16"


# ---- help ----


def test_the_help_knows_every_field_with_its_default():
    """One place has each default and help: the dataclasses that need no torch. CALConfig takes them from there."""
    bases = [base for base in Config.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {one.name for base in bases for one in dataclasses.fields(base)}
    own = {one.name: one for one in dataclasses.fields(Config)}
    del own["logging_nan_inf_filter"]  # an inherited one with another default: --help-all has it
    new = {name for name in own if name not in inherited} | {"padding_free"}
    found = {name: (default, help) for name, default, help in config_fields()}
    assert set(found) == new
    for name, (default, help) in found.items():
        assert (default, help) == (own[name].default, own[name].metadata["help"]), name
    assert set(NOT_HERE) <= set(own)
    shown = text()
    assert all(f"--{name}" in shown for name in [*found, *KEYS])
    everything = text(everything=True)
    assert all(f"--{name}" in everything for name in {*own, "logging_nan_inf_filter"} - set(NOT_HERE))


def test_the_help_imports_nothing_heavy():
    code = (
        "import sys; from seecal.recipes.run import run; assert run(['--help']) == 0; "
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=limit()
    )
    assert done.stdout.endswith("[]\n"), done


CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def test_a_weighting_of_the_folder_in_which_the_command_runs(recipe, tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text("def twice(visual_delta, options):\n    return visual_delta.delta * 0 + 2\n")
    (stage,) = recipe({**CPU, "weighting": "mine_here:twice"}).stages
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = list(sys.path)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ValueError, match=r"no module 'mine_here'.*PYTHONPATH"):
        stage.config(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert stage.config(tmp_path / "out").weighting == "mine_here:twice"
    assert sys.modules["mine_here"].__file__ == str(tmp_path / "mine_here.py")
    assert sys.path == before


def test_freeze_at_the_top_holds_for_the_stages_in_which_the_word_table_trains(recipe):
    first, second = recipe({"freeze": "embeddings", "stages": STAGES}).stages
    assert (first.freeze, second.freeze) == ((), ("embeddings",))


def test_ddp_does_not_look_for_unused_parameters_in_each_step(recipe, tmp_path):
    """Every trained tensor has a gradient in every step, as check_gradients sees to."""
    for settings, expected in (({}, False), ({"ddp_find_unused_parameters": True}, True)):
        (stage,) = recipe({**CPU, **settings}).stages
        assert stage.config(tmp_path).ddp_find_unused_parameters is expected


def test_what_a_stage_does_when_nothing_is_said(recipe):
    (stage,) = recipe({}).stages
    assert stage.check_gradients is True, "an untrained projector would go unnoticed"
    assert stage.on_bad == "error"
    assert stage.streaming is stage.cache_vision_features is False
    assert stage.train == ("projector", "language_model")


@pytest.mark.parametrize("contrast", ["blur", "patch_mask", "noise", "swap"])
def test_kept_features_and_changed_pixels_exclude_each_other(recipe, tmp_path, contrast):
    (stage,) = recipe({**CPU, "cache_vision_features": True, "contrast": contrast}).stages
    with pytest.raises(ValueError, match=f"cache_vision_features with contrast: {contrast}: that changes the pixels"):
        stage.config(tmp_path / "out")
    (stage,) = recipe({**CPU, "cache_vision_features": True, "contrast": "mask"}).stages
    assert stage.config(tmp_path / "out").contrast == "mask"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"learning_rates": {"vision_tower": 1e-6}},
            "learning_rates: vision_tower does not train here; what trains is",
        ),
        ({"learning_rates": {"lora": 1e-4}}, "learning_rates: lora does not train here"),
        ({"learning_rates": {"lm_head": 1e-4, "projector": 1e-3}}, "learning_rates: lm_head does not train here"),
        ({"logging_tokens_steps": 5}, "logging_tokens_steps: 5 without eval_data"),
        ({"eval_metric": "exact", "eval_data": []}, "eval_metric: exact without eval_data"),
        ({"eval_strategy": "epoch"}, "eval_strategy: epoch without eval_data"),
        ({"save_strategy": "best"}, "save_strategy: best: by which figure"),
        ({"streaming": True, "max_steps": 1, "weights": "scores"}, "weights with streaming: true"),
        (
            {"streaming": True, "max_steps": 1, "weighting": "vig", "vig_percentile": 70},
            "vig_percentile with streaming",
        ),
        ({"streaming": True, "max_steps": 1, "weighting": "prior", "prior_reference": "m"}, "prior_reference with str"),
    ],
)
def test_what_contradicts_the_rest_of_its_stage_is_told_with_its_number(recipe, tmp_path, settings, message):
    first, second = recipe({**CPU, "stages": [{"train": "projector"}, settings]}).stages
    assert first.config(tmp_path / "out").output_dir
    with pytest.raises(ValueError, match=f"^stage 2: {re.escape(message)}"):
        second.config(tmp_path / "out")


def test_a_weighting_that_nobody_knows_is_told_before_anything_is_loaded(recipe, tmp_path):
    (stage,) = recipe({**CPU, "weighting": "magic"}).stages
    with pytest.raises(ValueError, match=r"'magic' is not in seecal.WEIGHTINGS; it has cal, uniform, vig"):
        stage.config(tmp_path / "out")
