"""Which way of launching a plan takes, adapters and 4 bits, what it says where it knows nothing, and the command."""

import json

import pytest
from typer.testing import CliRunner

from seecal.cli.main import app
from seecal.models.quantised import four_bit_config
from seecal.planning.memory import ENGINES, Counts, Precision, held, optimizer_named
from seecal.planning.plan import first_that_fits, plan
from tests.support.recipe_files import recipe_file
from tests.support.tiny import tiny_llava

BILLION = 10**9
FULL = Counts(all=7 * BILLION, trained=7 * BILLION, layer=BILLION // 5, outside=BILLION // 2)


def stage(tiny, base, gpus=1, memory=80.0, **changes):
    return plan(recipe_file(base / "r.yaml", tiny, base / "run", **changes), gpus=gpus, memory=memory).stages[0]


# ---- Which way of launching ----


def test_what_is_spread_is_divided_and_what_is_not_is_not():
    eight, sixteen = ({engine: held(engine, FULL, gpus, Precision()) for engine in ENGINES} for gpus in (8, 16))
    for engine in ("single", "ddp"):
        assert eight[engine] == sixteen[engine]
    for engine in ("fsdp2", "zero3"):
        assert eight[engine].weights == 2 * sixteen[engine].weights
    for engine in ("fsdp2", "zero2", "zero3"):
        assert eight[engine].optimizer == 2 * sixteen[engine].optimizer == 8 * FULL.trained / 8
        assert eight[engine].communication == sixteen[engine].communication


def test_an_optimizer_in_8_bits_takes_a_quarter():
    moments = {
        optim: held("ddp", FULL, 1, Precision(optimizer=optimizer_named(optim))).optimizer
        for optim in ("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "lion_32bit", "sgd")
    }
    assert moments["adamw_torch"] == moments["adamw_torch_fused"] == 8 * FULL.trained
    assert moments["paged_adamw_8bit"] == pytest.approx(moments["adamw_torch"] / 4, rel=0.02)
    assert moments["lion_32bit"] == moments["adamw_torch"] / 2
    assert moments["sgd"] == 0
    assert optimizer_named("galore_adafactor") is None


def test_the_first_that_fits_is_chosen(tiny, tmp_path):
    roomy = stage(tiny, tmp_path, gpus=8)
    assert roomy.chosen == "ddp"
    sizes = {name: one.total / 1e9 for name, one in roomy.engines.items() if not one.for_other_counts}
    assert list(sizes) == ["ddp", "fsdp2", "zero2", "zero3"]
    assert first_that_fits(roomy.engines, (sizes["fsdp2"] + sizes["ddp"]) / 2 * 1e9) == "fsdp2"
    assert first_that_fits(roomy.engines, 1000) is None


def test_what_cannot_be_launched_is_not_chosen(tiny, tmp_path):
    def reasons(**changes):
        engines = stage(tiny, tmp_path, gpus=4, **changes).engines
        return {name: one.why_not for name, one in engines.items() if one.why_not and not one.for_other_counts}

    assert reasons() == {}
    assert reasons(gradient_accumulation_steps=2) == dict.fromkeys(("zero2", "zero3"), "refuses accumulation")
    assert reasons(gradient_accumulation_steps=2, normalize="micro_batch") == {}
    four = {"lora": {"r": 2}, "train": "lora", "model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}
    assert reasons(**four) == dict.fromkeys(("fsdp2", "zero2", "zero3"), "not in 4 bits")
    assert set(reasons(train="projector", cache_vision_features=True)) == {"fsdp2", "zero2", "zero3"}


# ---- Adapters, 4 bits ----


def test_adapters_are_counted_as_peft_makes_them(tiny, tmp_path):
    whole = stage(tiny, tmp_path)
    lora = stage(tiny, tmp_path, train=["lora"], lora={"r": 4})
    layers, width, inter = 2, 64, 96
    ends = [(width, width), (width, 32), (width, 32), (width, width), (width, inter), (width, inter), (inter, width)]
    assert lora.trained == 4 * layers * sum(a + b for a, b in ends)
    assert lora.parameters == whole.parameters + lora.trained
    one = lora.engines["single"].held
    assert (one.gradients, one.optimizer) == (4 * lora.trained, 8 * lora.trained)
    assert one.weights == 4 * lora.parameters


@pytest.mark.parametrize("settings", [{}, {"bnb_4bit_use_double_quant": True}])
def test_weights_in_4_bits_are_as_large_as_those_of_bitsandbytes(tiny, tmp_path, settings):
    pytest.importorskip("bitsandbytes")
    from tests.support.four_bit import in_four_bits

    given = {"load_in_4bit": True, **settings}
    said = stage(tiny, tmp_path, train=["lora"], lora={"r": 4}, model_init_kwargs={"quantization_config": given})
    skipped = four_bit_config(str(tiny / "model"), given, False)["llm_int8_skip_modules"]
    real = in_four_bits(tiny_llava(), tmp_path / "four", llm_int8_skip_modules=skipped, **settings)
    size = 0
    for parameter in real.parameters():
        size += parameter.untyped_storage().nbytes()
        if state := getattr(parameter, "quant_state", None):
            scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            size += sum(one.numel() * one.element_size() for one in scales)
    assert said.engines["single"].held.weights - 4 * said.trained == pytest.approx(size, rel=0.01)
    assert said.chosen == "single"


# ---- What is not known ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at-all"}, "nowhere/at-all: no folder with a config.json"),
        ({"model": "nowhere/at-all", "architecture": "llava-9b"}, "llava-9b: .*llava-1.5-7b"),
        ({"data": "no/such/file.json"}, "stage 1: data no/such/file.json: .*--records"),
        ({"train": "vision"}, "vision"),
    ],
)
def test_what_is_not_known_is_said(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        stage(tiny, tmp_path, **changes)


@pytest.mark.parametrize("wrong", [{"gpus": 0}, {"memory": -1}, {"mfu": 0}, {"mfu": 1.5}, {"peak_tflops": 0}], ids=str)
def test_numbers_out_of_range_are_refused(tiny, tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        plan(recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run"), **wrong)


def test_data_that_are_not_there_are_assumed_and_the_plan_says_so(tiny, tmp_path):
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", data="away/llava_v1_5_mix665k.json")
    found = plan(file, gpus=1)
    notes = " ".join(found.stages[0].notes)
    assert "665,298 records (liuhaotian/LLaVA-Instruct-150K" in notes
    assert "300 tokens of text (ASSUMED, --text-tokens), 150 of them labels (ASSUMED)" in notes
    given = plan(file, gpus=1, records=1000, text_tokens=40, overrides=["--num_train_epochs", "1"]).stages[0]
    assert (given.steps, given.records) == (250, 1000)
    assert given.text_tokens == pytest.approx(40_000)
    assert "1,000 records (as given)" in " ".join(given.notes)
    assert "ASSUMED, --text-tokens" not in " ".join(given.notes)


def test_data_that_are_there_are_counted_without_a_processor(tiny, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny / "model" / "config.json").read_bytes())
    found = stage(tiny, tmp_path, model="nowhere/tiny", architecture=str(tmp_path / "bare"), num_train_epochs=1)
    assert (found.steps, found.records) == (16, 64)
    assert "data.json, counted" in " ".join(found.notes)


# ---- The command ----


def test_the_command_prints_the_plan_and_its_json(tiny, tmp_path):
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run")
    shown = CliRunner().invoke(app, ["plan", "--config", file, "--gpus", "2", "--max_steps", "5"])
    assert shown.exit_code == 0, shown.output
    assert "5 steps of 8 records" in shown.output
    assert "seecal accelerate-config ddp" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 118
    as_json = CliRunner().invoke(app, ["plan", "--config", file, "--gpus", "2", "--memory", "1e-9", "--json"])
    assert as_json.exit_code == 1, "nothing fits"
    found = json.loads(as_json.output)
    assert found["stages"][0]["chosen"] is None
    assert found["stages"][0]["engines"]["ddp"]["total"] > 0
    assert found["hours"] == pytest.approx(found["stages"][0]["hours"])


@pytest.mark.parametrize("size", ["640", "0x480", "640X480", "ax3"])
def test_a_size_that_is_none(size):
    from seecal.planning.workload import size_named

    with pytest.raises(ValueError, match=r"--image-size .*640x480"):
        size_named(size)
    assert size_named("640x480") == (640, 480)
