"""Answers measured while training: the training stays the same, and the figure is that of seecal.evaluate."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from trl import TrlParser

import seecal
from seecal import CALConfig, CALTrainer
from seecal.models.generate import answers
from seecal.trainer.answer_metrics import answer_metric, shares
from tests.models.test_generate import scaled
from tests.support.paths import ROOT
from tests.support.processes import two_ranks
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_image, tiny_llava, tiny_llava_processor

ASKED = {"eval_metric": "exact", "eval_max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 2}


def network(dropout=0.0):
    model = scaled(tiny_llava().float())
    model.generation_config.eos_token_id = None
    for module in model.modules():  # dropout draws random numbers in every training forward
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def trainer_of(folder, evaluation=None, *, accumulation=1, peft=None, dropout=0.0, **changes):
    args = sgd_config(folder, 2, accumulation, **{"max_steps": 4, "learning_rate": 0.005, **changes})
    evaluation = tiny_dataset(6, 3) if evaluation is None else evaluation
    return CALTrainer(
        network(dropout),
        args,
        train_dataset=tiny_dataset(16),
        eval_dataset=None if evaluation == "none" else evaluation,
        processing_class=tiny_llava_processor(),
        peft_config=peft,
    )


def logged(trainer, name):
    return [one[name] for one in trainer.state.log_history if name in one]


def questions(said=None, count=6):
    """Records, one without an image, whose answers are ``said`` where it has one."""
    records = []
    for number in range(count):
        images = [] if number == 2 else [tiny_image(["red", "blue", "green"][number % 3])]
        true = (said or {}).get(number) or "never"
        messages = [{"role": "user", "content": f"Colour {number}?"}, {"role": "assistant", "content": true}]
        records.append({"id": f"q{number}", "messages": messages, "images": images})
    return records


# ---- The training is the same ----


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3},
        {"accumulation": 2, "contrast": "swap", "train_sampling_strategy": "random"},
        {"gradient_checkpointing": True, "dropout": 0.3, "bf16": True},
        {"peft": LoraConfig(r=2, target_modules=r".*language_model.*q_proj", lora_dropout=0.3)},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_losses_and_weights_are_the_same_to_the_bit(changes, tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 2}
    plain = trainer_of(tmp_path / "plain", **often, **changes)
    plain.train()
    asked = trainer_of(tmp_path / "asked", **ASKED, **changes)
    asked.train()
    for name, count in (("loss", 4), ("grad_norm", 4), ("eval_loss", 2)):
        assert logged(plain, name) == logged(asked, name)
        assert len(logged(plain, name)) == count
    assert len(logged(asked, "eval_exact")) == 2
    assert not logged(plain, "eval_exact")
    weights = asked.model.state_dict()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert asked.model.training == plain.model.training


def test_modes_and_random_numbers_are_as_before(tmp_path):
    trainer = trainer_of(tmp_path, questions(), **ASKED)
    model = trainer.model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    hook = model.register_forward_pre_hook(lambda *_: print(draws()))  # a model that draws

    def draws():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    assert trainer._answer_metric.measured(trainer.eval_dataset, "eval") == {"eval_exact": 0}
    hook.remove()
    assert draws() == expected
    assert modes == [module.training for module in model.modules()]


# ---- The figure ----


def test_the_figure_is_that_of_the_answers_at_the_time_and_of_evaluate(tmp_path):
    settings = {**ASKED, "per_device_eval_batch_size": 4}
    first = trainer_of(tmp_path / "first", questions(), **settings)
    before = answers(first.model, first.processing_class, questions(), max_new_tokens=4)
    first.train()
    after = answers(first.model, first.processing_class, questions(), max_new_tokens=4)
    assert before != after
    assert logged(first, "eval_exact") == [0, 0]
    said = {place: text for place, text in enumerate(after) if text and place != 1}
    trainer = trainer_of(tmp_path / "second", questions(said), **settings)
    trainer.train()
    figure = logged(trainer, "eval_exact")[-1]
    assert figure == pytest.approx(100 * len(said) / 6)
    assert 0 < figure < 100
    rows = []
    for record in questions(said):
        for number, image in enumerate(record["images"]):
            image.save(tmp_path / f"{record['id']}-{number}.png")
        paths = [f"{record['id']}-{number}.png" for number in range(len(record["images"]))]
        rows.append({**record, "images": paths})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = seecal.evaluate(
        trainer.model,
        tmp_path / "data.jsonl",
        "exact",
        processor=trainer.processing_class,
        max_new_tokens=4,
        resamples=10,
    )
    assert found.value == figure
    few = trainer_of(tmp_path / "third", questions(said), **settings, eval_metric_records=3)
    few.model.load_state_dict(trainer.model.state_dict())
    expected = 100 * sum(place in said for place in range(3)) / 3
    assert few.evaluate()["eval_exact"] == pytest.approx(expected)


def test_several_sets_a_stream_and_another_set_have_their_own(tmp_path):
    trainer = trainer_of(tmp_path, {"a": questions(), "b": tiny_dataset(3, 3).to_iterable_dataset()}, **ASKED)
    said = answers(trainer.model, trainer.processing_class, questions(), max_new_tokens=4)
    found = trainer.evaluate()
    assert found["eval_a_exact"] == found["eval_b_exact"] == 0
    right = questions({place: text for place, text in enumerate(said) if text})
    assert trainer.evaluate(right)["eval_exact"] > 0
    assert "test_exact" not in trainer.predict(tiny_dataset(2)).metrics


@pytest.mark.parametrize("metric", ["anls", "relaxed", "ocr", "cider", "choice", "choice_mmt", "choice_scienceqa"])
def test_each_metric_that_one_answer_is_enough_for(metric, tmp_path):
    trainer = trainer_of(tmp_path, questions(), **{**ASKED, "eval_metric": metric})
    assert trainer.evaluate()[f"eval_{metric}"] >= 0


def test_the_best_model_is_the_one_that_answers_best(tmp_path):
    settings = {**ASKED, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, questions(), **settings, metric_for_best_model="eval_exact")
    trainer.train()
    assert trainer.state.best_metric == 0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2"), "no later one is better"


def test_an_answer_is_one_text_whatever_it_looks_like(tmp_path):
    said = {0: "[12]", 1: "[0.1, 0.2]", 2: "[]"}
    trainer = trainer_of(tmp_path, questions(said, 3), eval_metric="exact")
    chosen = trainer._answer_metric.choose(trainer.eval_dataset, "")
    assert chosen.references == [[text] for text in said.values()]


# ---- What cannot be ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_metric": "bleu"}, "eval_metric='bleu' is not known: expected one of exact, anls"),
        ({"eval_metric": "vqa"}, "eval_metric='vqa' compares the answers of several people"),
        ({"eval_metric": "exact", "eval_metric_records": 0}, "eval_metric_records=0"),
        ({"eval_metric": "exact", "eval_max_new_tokens": 0}, "eval_max_new_tokens=0"),
    ],
)
def test_a_config_that_cannot_be(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CALConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **change)


def test_without_data_or_a_record_that_can_be_asked(tmp_path):
    with pytest.raises(ValueError, match="eval_metric=exact without eval_dataset"):
        trainer_of(tmp_path, "none", eval_metric="exact")
    lost = [{**questions()[0], "images": ["/no/such/file.png"]}, *questions()[1:]]
    with pytest.raises(FileNotFoundError, match=r"eval_metric: eval_dataset: record 'q0'.*no such file"):
        trainer_of(tmp_path, lost, eval_metric="exact")
    skipping = {"eval_metric": "exact", "on_bad": "skip", "max_bad_records": None}
    trainer = trainer_of(tmp_path / "skips", lost, **skipping)
    assert trainer._answer_metric.choose(trainer.eval_dataset, "").names == [f"record 'q{n}'" for n in range(1, 6)]
    with pytest.raises(ValueError, match="none of the first 1 records of eval_dataset can be asked"):
        trainer_of(tmp_path / "none", lost, **skipping, eval_metric_records=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_deepspeed_enabled": True}, "eval_metric=exact with DeepSpeed"),
        ({"is_fsdp_enabled": True}, "eval_metric=exact with FSDP of version 1"),
        ({"processing_class": object()}, "processing_class is a object, which cannot make a question"),
    ],
)
def test_launches_and_processors_that_cannot(changes, message):
    given = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "eval_dataset": questions(), **changes}
    accelerator = SimpleNamespace(is_fsdp2=False)
    trainer = SimpleNamespace(args=SimpleNamespace(eval_metric="exact"), accelerator=accelerator, **given)
    with pytest.raises(ValueError, match=message):
        answer_metric(trainer)


def test_the_command_line_knows_it(tmp_path):
    asked = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--bf16",
        "false",
        "--eval_metric",
        "anls",
        "--eval_metric_records",
        "5",
    ]
    (config,) = TrlParser(CALConfig).parse_args_and_config(asked)
    assert (config.eval_metric, config.eval_metric_records, config.eval_max_new_tokens) == ("anls", 5, 64)


# ---- Ranks ----


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 4), st.integers(1, 5))
def test_shares_are_in_step_and_hold_each_record_once(pictured, ranks, batch_size):
    of_ranks = [list(shares(pictured, rank, ranks, batch_size)) for rank in range(ranks)]
    assert len({len(batches) for batches in of_ranks}) == 1
    for together in zip(*of_ranks, strict=True):
        assert len({pictured[place] for places, _ in together for place in places}) == 1, "all with images, or none"
        assert all(1 <= len(places) <= batch_size for places, _ in together)
    counted = sorted(place for batches in of_ranks for places, counts in batches if counts for place in places)
    assert counted == list(range(len(pictured)))


def test_two_ranks(tmp_path):
    """DDP and sharded parameters: all ranks log the figure of one process, and the training stays the same."""
    two_ranks(ROOT / "tests" / "support" / "answer_metrics_worker.py", tmp_path, cwd=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        assert rank["losses"] == rank["plain losses"] == ranks[0]["losses"]
        assert all(torch.equal(one, rank["plain weights"][name]) for name, one in rank["weights"].items())
        assert rank["figures"] == ranks[0]["figures"]
        assert len(rank["figures"]) == 2
        assert rank["after"][0] == rank["before"][0], "a step after the answers is the one before them"
        assert torch.equal(rank["after"][1], rank["before"][1])
        assert rank["sharded"]["eval_exact"] == pytest.approx(ranks[0]["whole"])
        assert 0 < rank["sharded"]["eval_exact"] < 100
