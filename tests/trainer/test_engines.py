"""CALTrainer under DDP, FSDP2 and DeepSpeed's ZeRO, on two gloo ranks of the CPU, takes the steps of one process.

Lengths are uneven; one rank is text-only, one has no label, one meets a bad record: each while the other goes on.
"""

import pytest
import torch

from seecal import CALTrainer
from seecal.trainer import cal_trainer
from tests.support.engine_ranks_worker import DAMAGED, ENGINES, UNANSWERED, eval_loss, steps
from tests.support.paths import ROOT
from tests.support.processes import two_ranks
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_llava, tiny_llava_processor, tiny_records
from tests.trainer.test_deepspeed import needs_deepspeed

SAME = ("loss", "cross_entropy", "grad_norm", "delta_mean", "share_inside", "label_tokens", "num_tokens")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(the folder with the model, {bad records?: (weights, log, what was put aside, eval_loss)}) of one process."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_llava().save_pretrained(folder / "model")
    found = {}
    for bad in (True, False):
        trainer, log, told = steps(folder, 8, bad)
        found[bad] = trainer.model.state_dict(), log, told, eval_loss(trainer)
    return folder, found


@pytest.mark.parametrize(
    "engine", [one if "zero" not in one else pytest.param(one, marks=needs_deepspeed) for one in ENGINES]
)
def test_two_ranks_are_one(tmp_path, alone, engine):
    folder, found = alone
    (tmp_path / "model").symlink_to(folder / "model")
    worker = ROOT / "tests" / "support" / "engine_ranks_worker.py"
    two_ranks(worker, tmp_path, engine, cwd=tmp_path, minutes=6 if "zero" in engine else 1)
    for bad, (weights, log, told, loss) in found.items():
        two = torch.load(tmp_path / f"{bad}.pt", weights_only=True)
        assert two["sharded"] == (engine == "fsdp2")
        assert two["told"] == told
        assert engine != "fsdp2" or two["eval_loss"] == pytest.approx(loss, rel=1e-5)
        for name in SAME:
            expected = [one[name] for one in log]
            assert [one[name] for one in two["log"]] == pytest.approx(expected, rel=1e-5, abs=1e-5), (bad, name)
        for name, value in weights.items():
            assert (two["weights"][name] - value).abs().max() <= 1e-5, (bad, name)


def test_what_one_process_met(alone):
    weights, log, told, _ = alone[1][True]
    assert {one[0] for one in told} == {f"r{DAMAGED}", f"r{UNANSWERED}"}
    assert any(one["share_inside"] > 0 for one in log), "CAL weights differ from 1"
    silent = alone[1][False][1]
    assert silent[2]["label_tokens"] < log[2]["label_tokens"], "half of the third step has no label"
    assert any((weights[name] != value).any() for name, value in alone[1][False][0].items())


def flagged(trainer, flag):
    """In its batches alone the trainer takes itself to be under an engine."""
    step = trainer.prediction_step

    def prediction_step(*args, **kwargs):
        setattr(trainer, flag, True)
        found = step(*args, **kwargs)
        setattr(trainer, flag, False)
        return found

    return prediction_step


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", None])
@pytest.mark.parametrize(("what", "forwards"), [("evaluate", 1), ("compute_metrics", 2), ("predict", 2)])
def test_an_evaluation_of_text_alone_runs_the_tower_where_weights_are_shared(
    tmp_path, monkeypatch, engine, what, forwards
):
    """Ranks that have images wait for this one's part of the tower's weights, in each of their forwards."""
    rows = tiny_records(4)
    for row in rows[2:]:
        row["images"] = []
    args = sgd_config(tmp_path, 2, 1, per_device_eval_batch_size=2)
    metrics = (lambda found: {}) if what == "compute_metrics" else None
    model, calls, losses = tiny_llava(), [], []
    trainer = CALTrainer(
        model, args, train_dataset=rows, processing_class=tiny_llava_processor(), compute_metrics=metrics
    )
    model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    for flag in (None, engine):
        calls.clear()
        if flag is not None:
            monkeypatch.setattr(cal_trainer, "world_size", lambda: 2)
            trainer.prediction_step = flagged(trainer, flag)
        found = trainer.predict(rows).metrics if what == "predict" else trainer.evaluate(rows)
        losses.append(found["test_loss" if what == "predict" else "eval_loss"])
        assert len(calls) == forwards * (1 if flag is None else 2), "one batch has images, the other only text"
    assert losses[1] == losses[0]
