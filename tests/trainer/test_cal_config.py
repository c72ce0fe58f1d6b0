"""CALConfig: CAL's options beside TRL's arguments, from Python, the command line and YAML; what it refuses."""

import dataclasses

import pytest
from trl import SFTConfig, TrlParser

from seecal import CALConfig, CALOptions

BASE = {"bf16": False, "use_cpu": True, "report_to": []}


def test_every_option_is_a_field_with_the_same_default_and_a_help_text(tmp_path):
    fields = {one.name: one for one in dataclasses.fields(CALConfig)}
    for option in dataclasses.fields(CALOptions):
        assert fields[option.name].default == option.default, option.name
        assert fields[option.name].metadata["help"] == option.metadata["help"], option.name
        assert len(option.metadata["help"]) > 20, option.name
        assert f"{option.name}: " in CALOptions.__doc__, "its docstring is made of the same texts"
    assert CALConfig(str(tmp_path), **BASE).cal_options() == CALOptions()
    assert {one.name for one in dataclasses.fields(SFTConfig)} < set(fields)


def test_command_line(tmp_path):
    arguments = f"--output_dir {tmp_path} --bf16 false --use_cpu true --beta 3 --padding_free false --chunk_size 64"
    (config,) = TrlParser([CALConfig]).parse_args_and_config(arguments.split())
    assert config.cal_options() == CALOptions(beta=3.0, padding_free=False, chunk_size=64)


@pytest.mark.parametrize("value", ["true", "false", "auto"])
def test_yaml(tmp_path, value):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"output_dir: {tmp_path}\nbf16: false\nuse_cpu: true\nwindow: 5\npadding_free: {value}\n")
    (config,) = TrlParser([CALConfig]).parse_args_and_config(["--config", str(file), "--alpha", "0.5"])
    expected = {"true": True, "false": False}.get(value, value)
    assert config.cal_options() == CALOptions(window=5, alpha=0.5, padding_free=expected)


def test_the_help_names_every_option():
    text = TrlParser([CALConfig]).format_help()
    for option in dataclasses.fields(CALOptions):
        assert f"--{option.name}" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 6.0}, "alpha=6.0, beta=5.0"),
        ({"window": 2}, "window=2"),
        ({"pool_scope": "released"}, "Set contrast='mask'"),
        ({"contrast": "erase"}, "contrast='erase': expected one of"),
        ({"normalize": "mean"}, "normalize='mean': expected one of global"),
        ({"padding_free": "maybe"}, "padding_free='maybe'"),
        ({"packing": True}, "packing=True.*Set packing=False"),
        ({"eval_packing": True}, "eval_packing=True"),
        ({"loss_type": "dft"}, "loss_type='dft'.*weighting="),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter=True"),
        ({"optim": "lomo", "gradient_accumulation_steps": 2}, "optim='lomo' with gradient_accumulation_steps=2"),
        ({"optim": "galore_adamw_layerwise", "gradient_accumulation_steps": 2}, "normalize='micro_batch'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        CALConfig(str(tmp_path), **BASE, **changes)


def test_deepspeed_with_accumulation_is_refused(tmp_path):
    config = CALConfig(str(tmp_path), **BASE)
    config.deepspeed, config.gradient_accumulation_steps = {"zero_optimization": {"stage": 2}}, 2
    with pytest.raises(ValueError, match=r"DeepSpeed with gradient_accumulation_steps=2 and normalize='global'.*Set"):
        config.refuse_unsupported()
    for normalize in ("micro_batch", "tokens", "sample", "matched"):  # what these divide by is known before
        config.normalize = normalize
        config.refuse_unsupported()
