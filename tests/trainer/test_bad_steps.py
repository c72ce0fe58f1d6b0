"""A step with numbers that are not finite: stopped before the optimizer, saved, and the same when it is replayed."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

import seecal
from seecal import CALTrainer, VisionCollator
from seecal.cli import main as cli
from seecal.core import forward
from seecal.models.loading import load_vlm
from seecal.recipes.trainable import prepare
from seecal.trainer import bad_steps
from tests.support.bad_numbers import BackInf, planted, tell_inf
from tests.support.paths import ROOT
from tests.support.processes import two_ranks
from tests.support.run_example import run_example
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor


class Change(TrainerCallback):
    """Changes a row of the head before the second step."""

    def __init__(self, value):
        self.value = value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                model.lm_head.weight[5] = self.value


def trainer_of(folder, model=None, accumulation=1, collator=None, callbacks=(), **changes):
    args = sgd_config(folder, 2, accumulation, **changes)
    return CALTrainer(
        model or tiny_llava(), args, collator, tiny_dataset(16), processing_class=tiny_llava_processor(),
        callbacks=[*callbacks],
    )  # fmt: skip


def stopped(trainer):
    """(the error's text, what it saved on this rank) of a training that must stop, with the weights as they were."""
    seen = {}
    trainer.add_callback(Keep(seen))
    with pytest.raises(FloatingPointError) as stop:
        trainer.train()
    now = trainer.model.state_dict()
    assert all(torch.equal(one, now[name]) for name, one in seen.items() if bool(one.isfinite().all()))
    (file,) = (trainer_folder(trainer)).glob("*/bad_step-*-rank-0.json")
    return str(stop.value), json.loads(file.read_text()), file.parent


class Keep(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.update({name: one.clone() for name, one in model.state_dict().items()})


def trainer_folder(trainer):
    return bad_steps.Path(trainer.args.output_dir) / bad_steps.FOLDER


def test_a_pixel_is_told_by_record_and_token_and_again_from_the_folder_alone(tmp_path):
    """The third step, of records r4 and r5; built anew from what was saved, without the training's model."""
    trainer = trainer_of(tmp_path, collator=planted("r5", math.nan))
    said, told, folder = stopped(trainer)
    assert folder == tmp_path / "bad_steps" / "3"
    assert "step 3: the loss is nan" in said
    assert "micro-batch 1 of 1: not finite are Δ at " in said
    assert "(record 'r5')" in said
    assert "r4" not in said
    assert f"seecal replay {folder}" in said
    (batch,) = told["micro_batches"]
    assert batch["suspects"] == ["record 'r5'"]
    assert batch["inputs_not_finite"].keys() == {"pixel_values"}
    assert {one["row"] for one in batch["not_finite"]["Δ"]["first"]} == {1}
    labels = load_file(folder / "bad_step-3-rank-0.safetensors")["1/labels"]
    for one in batch["not_finite"]["loss"]["first"]:
        assert labels[one["row"], one["column"]] == one["token_id"]
    found = seecal.replay(folder)
    assert found.exact
    assert not found.finite
    (again,) = found.batches
    assert [(one.name, one.finite) for one in again.records] == [("record 'r4'", True), ("record 'r5'", False)]
    assert again.inputs == ["pixel_values"]
    assert again.first_forward.endswith("whose input already is not")
    whole = seecal.replay(folder, trainer.model)
    assert whole.batches[0].records[0] == again.records[0], "the same weights, batch and random numbers"
    assert not whole.exact


@pytest.mark.parametrize("value", [math.nan, 3e38])
def test_a_weight_and_an_overflow_are_told_by_module(tmp_path, value):
    """A NaN in the head; and a row of it whose logit overflows: there Δ is finite, and the loss is not."""
    said, told, folder = stopped(trainer_of(tmp_path, callbacks=[Change(value)]))
    assert "step 2: the loss is " in said
    assert told["weights_not_finite"] == (["lm_head.weight"] if math.isnan(value) else [])
    assert "loss" in told["micro_batches"][0]["not_finite"]
    found = seecal.replay(folder)
    assert not found.finite
    assert all(norm >= 0 or math.isnan(norm) for norm in found.batches[0].gradient_norms.values())
    assert found.weights_not_finite == told["weights_not_finite"]


def test_an_infinite_delta_stops_though_its_weight_is_clamped(tmp_path, monkeypatch):
    tell_inf(monkeypatch.setattr, at_call=2)
    said, told, folder = stopped(trainer_of(tmp_path))
    assert "step 2: the loss is " in said
    assert "the loss is nan" not in said
    assert "not finite are Δ at 1 of " in said
    assert told["micro_batches"][0]["not_finite"].keys() == {"Δ"}
    assert told["micro_batches"][0]["not_finite"]["Δ"]["tokens"] == 1
    monkeypatch.undo()
    assert seecal.replay(folder).finite
    tell_inf(monkeypatch.setattr, at_call=1)
    again = seecal.replay(folder).batches[0]
    assert [one.finite for one in again.records] == [False, True]
    assert again.records[0].delta[1] == math.inf


def test_gradients_alone_are_told_by_where_they_come_from(tmp_path):
    model = tiny_llava()
    model.model.multi_modal_projector.act = BackInf()
    said, told, folder = stopped(trainer_of(tmp_path, model, accumulation=2))
    assert "Both passes are finite, the gradients are not (record 'r0', record 'r1', record 'r2', record 'r3')" in said
    assert told["ranks_not_finite"] == []
    assert [batch["number"] for batch in told["micro_batches"]] == [1, 2]
    found = seecal.replay(folder, model)
    assert not found.finite
    assert all(one.finite for batch in found.batches for one in batch.records)
    norms = found.batches[0].gradient_norms
    assert not math.isfinite(norms["projector"])
    assert math.isfinite(norms["language_model"])
    assert "multi_modal_projector.linear_1" in found.batches[0].first_backward
    assert seecal.replay(folder).finite, "what was saved has no such function"


def test_of_several_micro_batches_the_bad_one_is_named_and_saved(tmp_path):
    said, told, folder = stopped(trainer_of(tmp_path, accumulation=3, collator=planted("r3", math.inf)))
    assert "step 1: " in said
    assert "micro-batch 2 of 3: not finite are " in said
    assert "(record 'r3')" in said
    assert [batch["number"] for batch in told["micro_batches"]] == [2]
    assert {name.split("/")[0] for name in load_file(folder / "bad_step-1-rank-0.safetensors")} == {"2"}
    assert [batch.number for batch in seecal.replay(folder).batches] == [2]


@pytest.mark.parametrize("normalize", ["global", "sample"])
def test_no_false_alarm(tmp_path, normalize):
    trainer = trainer_of(tmp_path, accumulation=2, normalize=normalize)
    trainer.train()
    assert trainer.state.global_step == 4
    assert not trainer_folder(trainer).exists()
    assert trainer._watch.batches == [], "the batches of a step go with it"


def test_an_overflow_under_a_loss_scale_saves_nothing(tmp_path):
    model = tiny_llava()
    model.model.multi_modal_projector.act = BackInf(times=1)
    trainer = trainer_of(tmp_path, model, max_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2
    assert not trainer_folder(trainer).exists()


def test_a_full_disk_does_not_hide_the_numbers(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bad_steps, "save_file", full)
    with pytest.raises(FloatingPointError, match=r"record 'r5'.*could not be saved .*No space left"):
        trainer_of(tmp_path, collator=planted("r5", math.nan)).train()


def test_adapters_come_back_as_they_were(tmp_path):
    """LoRA with dropout and a trained projector: saved beside the base model, which lies in its folder."""
    run_example("tiny_folder.py", tmp_path / "tiny")
    source = str(tmp_path / "tiny" / "model")
    torch.manual_seed(0)
    model = prepare(load_vlm(source, dtype="float32")[0], ["lora", "projector"]).model
    trainer = trainer_of(tmp_path / "run", model, collator=planted("r5", math.nan))
    _, told, folder = stopped(trainer)
    assert told["model"] == source
    assert not told["all_weights_train"]
    assert all("lora_" in name or "modules_to_save" in name for name in load_file(folder / "weights.safetensors"))
    found = seecal.replay(folder)
    assert found.exact
    assert repr(found.batches[0].records) == repr(seecal.replay(folder, trainer.model).batches[0].records)
    assert found.batches[0].gradient_norms.keys() == {"lora", "projector"}


def test_weights_beyond_the_limit_are_the_last_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_steps, "WEIGHTS_LIMIT", 1000)
    changes = {"save_strategy": "steps", "save_steps": 1}
    _, told, folder = stopped(trainer_of(tmp_path, collator=planted("r5", math.nan), **changes))
    assert not told["weights_saved"]
    assert not (folder / "weights.safetensors").exists()
    found = seecal.replay(folder)
    assert "checkpoint-2, the last checkpoint: not those of the step" in found.weights
    assert not found.exact
    assert [one.finite for one in found.batches[0].records] == [True, False]


def test_a_folder_that_is_none_and_one_that_is_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        seecal.replay(tmp_path / "none")
    with pytest.raises(ValueError, match="no step that was stopped"):
        seecal.replay(tmp_path)
    _, _, folder = stopped(trainer_of(tmp_path / "run", collator=planted("r1", math.nan)))
    tensors = folder / "bad_step-1-rank-0.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(ValueError, match="bad_step-1-rank-0: damaged"):
        seecal.replay(folder)


def command(monkeypatch, capsys, *args):
    """(exit code, lines on stdout, lines on stderr) of seecal with these arguments."""
    monkeypatch.setattr(sys, "argv", ["seecal", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return stop.value.code, said.out.splitlines(), [line for line in said.err.splitlines() if "seecal:" in line]


def test_a_recipe_ends_with_one_line_and_replay_with_the_same(tmp_path, monkeypatch, capsys):
    from tests.support.recipe_files import recipe_file

    run_example("tiny_folder.py", tmp_path / "tiny")
    source = tmp_path / "tiny" / "model"
    model, processor = load_vlm(str(source))
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[3] = math.nan
    model.save_pretrained(source)
    processor.save_pretrained(source)
    file = recipe_file(tmp_path / "recipe.yaml", tmp_path / "tiny", tmp_path / "out")
    code, _, (line,) = command(monkeypatch, capsys, "train", "--config", file)
    assert code == 1
    assert "step 1: the loss is nan" in line
    folder = tmp_path / "out" / "stage-1" / "bad_steps" / "1"
    assert str(folder) in line
    code, said, errors = command(monkeypatch, capsys, "replay", folder)
    assert (code, errors) == (1, [])
    assert "weights that were not finite: model.multi_modal_projector.linear_2.bias" in said
    assert any(
        "first output that is not finite: model.multi_modal_projector.linear_2 (Linear)" in line for line in said
    )
    assert said[-1].startswith("not finite again: micro-batch 1 of rank 0")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[3] = 0
    model.save_pretrained(tmp_path / "mended")
    code, said, _ = command(monkeypatch, capsys, "replay", folder, "--model", tmp_path / "mended")
    assert (code, said[-1]) == (0, "all of it is finite this time")


def test_of_two_ranks_with_one_bad_both_stop(tmp_path):
    """Whatever the loss is divided by, and where only Δ of one rank is infinite and every loss is finite."""
    two_ranks(ROOT / "tests" / "support" / "bad_numbers.py", tmp_path, cwd=tmp_path)
    for case in ("global", "micro_batch", "delta"):
        said = [(tmp_path / f"{case}-{rank}.txt").read_text() for rank in (0, 1)]
        assert all("step 2: " in one and "Not finite on rank 1." in one for one in said), said
        assert f"(record '{'r6' if case == 'delta' else 'r7'}')" in said[1]  # the first label token is r6's
        folder = tmp_path / case / "bad_steps" / "2"
        told = [json.loads((folder / f"bad_step-2-rank-{rank}.json").read_text()) for rank in (0, 1)]
        assert [len(one["micro_batches"]) for one in told] == [0, 1]
        found = seecal.replay(folder)
        assert found.exact
        assert [(one.rank, one.finite) for one in found.batches] == [(1, case == "delta")]


def test_what_is_patched_is_there():
    """The tests above replace it by name."""
    assert callable(forward.visual_delta_of)
    assert isinstance(BackInf(), nn.Module)
    assert isinstance(planted("r1", 0.0).collator, VisionCollator)
