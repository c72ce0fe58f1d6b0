"""One evaluation record's tokens, logged while training: what is logged where, and that the training stays the same."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from trl import TrlParser

import seecal
from seecal import CALConfig, CALTrainer
from seecal.trainer import token_logging
from seecal.trainer.callbacks import GradientCheck
from seecal.trainer.random_numbers import same_random_numbers
from seecal.trainer.token_backends import ANSWER, DELTA, TABLE
from seecal.trainer.token_logging import measured, token_logger, token_texts
from tests.support.fake_wandb import Recorder, fake_wandb, give
from tests.support.paths import ROOT
from tests.support.processes import two_ranks
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records

STEPS = 2


@pytest.fixture
def wandb(monkeypatch):
    fake = fake_wandb()
    give(monkeypatch, "wandb", fake)
    return fake


def trainer_of(folder, *, accumulation=1, evaluation=None, peft=None, callbacks=(), dropout=0.0, **changes):
    model = tiny_llava()
    for module in model.modules():  # dropout draws random numbers in every training forward
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    args = sgd_config(folder, 2, accumulation, **{"max_steps": STEPS, **changes})
    evaluation = tiny_dataset(4, 3) if evaluation is None else evaluation
    return CALTrainer(
        model,
        args,
        train_dataset=tiny_dataset(16),
        eval_dataset=evaluation if evaluation != "none" else None,
        processing_class=tiny_llava_processor(),
        peft_config=peft,
        callbacks=list(callbacks),
    )


def losses(trainer):
    return [(one["loss"], one["grad_norm"]) for one in trainer.state.log_history if "loss" in one]


def steps_of(fake):
    return [one["train/global_step"] for one in fake.logs]


class Drawing(torch.utils.data.Dataset):
    """Records whose images are augmented, say: each look at one draws random numbers."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(1)
        return tiny_records(2)[index]


# ---- The training is the same ----


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3, "evaluation": Drawing()},
        {"accumulation": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"gradient_checkpointing": True, "dropout": 0.3},
        {"peft": LoraConfig(r=2, target_modules=r".*language_model.*q_proj", lora_dropout=0.3)},
        {"neftune_noise_alpha": 5.0, "bf16": True},
        {"contrast": "swap", "train_sampling_strategy": "random", "dataloader_num_workers": 1},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_losses_and_weights_are_the_same_to_the_bit(changes, tmp_path, wandb):
    plain = trainer_of(tmp_path / "plain", **changes)
    plain.train()
    logged = trainer_of(tmp_path / "logged", logging_tokens_steps=1, callbacks=[Recorder()], **changes)
    logged.train()
    assert steps_of(wandb) == [*range(STEPS + 1)]
    assert losses(plain) == losses(logged)
    assert len(losses(plain)) == STEPS
    weights = logged.model.state_dict()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    shown = [one[TABLE][2] for one in wandb.logs]
    assert shown[0] != shown[-1], "Δ is that of the weights at the time"
    assert [row[0] for row in shown[0]] == [row[0] for row in shown[-1]], "of one and the same record"


def test_modes_and_random_numbers_are_as_before(tmp_path):
    model = tiny_llava().train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    trainer = trainer_of(tmp_path)
    batch = dict(trainer.data_collator(tiny_records(1)))
    batch.pop("record_ids"), batch.pop("long_records")

    def draws():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    hook = model.register_forward_pre_hook(lambda *_: print(draws()))  # a model that draws
    measured(model, batch, trainer.cal_options)
    hook.remove()
    assert draws() == expected
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    with pytest.raises(KeyError), same_random_numbers():
        raise KeyError(draws())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert draws() == expected


def test_what_is_shown_is_the_delta_of_visual_delta(tmp_path, wandb):
    settings = {"max_steps": 1, "learning_rate": 0.0, "dropout": 0.3}  # of a training, which no measurement may have
    trainer = trainer_of(tmp_path, logging_tokens_steps=1, callbacks=[Recorder()], **settings)
    trainer.train()
    before, log = wandb.logs
    assert before[TABLE] == log[TABLE], "nothing was learnt"
    batch = trainer.data_collator([trainer.eval_dataset[0]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    expected = seecal.visual_delta(tiny_llava().eval(), inputs)
    columns, rows = log[TABLE][1:]
    assert columns == ["token", "delta", "has_contrast"]
    assert [row[1] for row in rows] == pytest.approx(expected.delta.tolist(), abs=1e-5)
    answer = trainer.eval_dataset[0]["messages"][-1]["content"]
    answer = answer if isinstance(answer, str) else answer[0]["text"]
    assert "".join(row[0] for row in rows).replace("<|end|>", "").strip() == answer
    assert log[DELTA][1].tolist() == pytest.approx(expected.delta[expected.has_contrast].tolist(), abs=1e-5)
    assert log[ANSWER][1].count("background:rgba(") >= len(rows)


def test_a_resumed_training_goes_on_with_its_steps(tmp_path, wandb):
    settings = {"logging_tokens_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer_of(tmp_path, callbacks=[Recorder()], **settings).train()
    whole = [one[TABLE][2] for one in wandb.logs]
    assert steps_of(wandb) == [0, 2, 4]
    wandb.logs.clear()
    again = trainer_of(tmp_path, callbacks=[Recorder()], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steps_of(wandb) == [4]
    assert wandb.logs[0][TABLE][2] == whole[-1]


# ---- Which record ----

TEXT_ONLY = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "images": []}


@pytest.mark.parametrize(
    ("first", "settings"),
    [
        (TEXT_ONLY, {}),
        ({**TEXT_ONLY, "messages": TEXT_ONLY["messages"][:1]}, {}),  # no answer
        ({**TEXT_ONLY, "messages": TEXT_ONLY["messages"][:1]}, {"on_bad": "skip"}),
        ({**tiny_records(1)[0], "images": []}, {}),  # an image is missing
    ],
)
def test_the_first_record_with_an_answer_after_an_image_is_shown(first, settings, tmp_path, wandb):
    records = [{**record, "id": f"number {index}"} for index, record in enumerate([first, *tiny_records(3)])]
    trainer_of(
        tmp_path, evaluation=records, logging_tokens_steps=9, callbacks=[Recorder()], max_steps=1, **settings
    ).train()
    assert "number 1" in wandb.logs[0][ANSWER][1]


def test_of_several_sets_and_of_a_stream_the_first(tmp_path, wandb):
    records = [{**record, "id": f"number {index}"} for index, record in enumerate(tiny_records(3))]
    first = tiny_dataset(3).remove_columns("id").add_column("id", ["x", "y", "z"])
    sets = {"a": first.to_iterable_dataset(), "b": records}
    trainer_of(tmp_path, evaluation=sets, logging_tokens_steps=9, callbacks=[Recorder()], max_steps=1).train()
    assert "<p>record &#x27;x&#x27;, step 0</p>" in wandb.logs[0][ANSWER][1]


@pytest.mark.parametrize(
    ("evaluation", "settings", "message"),
    [
        ("none", {}, "logging_tokens_steps=2 without eval_dataset.*Set eval_dataset"),
        ([TEXT_ONLY] * 3, {}, "none of the first 64 records of eval_dataset has an answer after an image"),
        ({"a": [TEXT_ONLY]}, {}, r"records of eval_dataset\['a'\]"),
        ([{**TEXT_ONLY, "messages": TEXT_ONLY["messages"][:1], "id": "bad"}], {}, "'bad'.*assistant"),
    ],
)
def test_data_without_a_record_to_show_is_refused(evaluation, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, evaluation=evaluation, logging_tokens_steps=2, callbacks=[Recorder()], **settings)


@pytest.mark.parametrize("steps", [-1, 1.5, True, "often"])
def test_a_number_of_steps_that_is_none_is_refused(steps, tmp_path):
    with pytest.raises(ValueError, match=r"logging_tokens_steps=.*expected a whole number of steps"):
        CALConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", logging_tokens_steps=steps)


def test_from_the_command_line(tmp_path):
    arguments = f"--output_dir {tmp_path} --bf16 false --use_cpu true --logging_tokens_steps 5"
    (config,) = TrlParser([CALConfig]).parse_args_and_config(arguments.split())
    assert config.logging_tokens_steps == 5


@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP of version 1"])
def test_where_it_is_not_tested_it_is_refused(engine, tmp_path):
    trainer = trainer_of(tmp_path, callbacks=[Recorder()])
    trainer.args.logging_tokens_steps = 2
    assert token_logger(trainer) is not None
    setattr(trainer, "is_deepspeed_enabled" if engine == "DeepSpeed" else "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match=f"logging_tokens_steps=2 with {engine}"):
        token_logger(trainer)


# ---- Backends ----


@pytest.mark.parametrize("steps", [None, 0])
def test_off_by_default(steps, tmp_path, wandb):
    trainer_of(tmp_path, logging_tokens_steps=steps, callbacks=[Recorder()], max_steps=1).train()
    assert wandb.logs == []


def test_without_a_backend_that_can_one_line_says_so(tmp_path, caplog):
    trainer = trainer_of(tmp_path, logging_tokens_steps=1, max_steps=1)
    said = [one.message for one in caplog.records if "cannot show tokens" in one.message]
    assert said == [
        "logging_tokens_steps=1: report_to='none' cannot show tokens, so none are logged there. Those that can: "
        "tensorboard, trackio, wandb."
    ]
    assert not any(type(one).__name__ == "TokenLogger" for one in trainer.callback_handler.callbacks)


def test_one_that_cannot_is_named_beside_one_that_can(tmp_path, wandb, caplog):
    args = sgd_config(tmp_path, 2, 1, max_steps=1, logging_tokens_steps=1)
    args.report_to = ["mlflow", "wandb"]
    settings = {"train_dataset": tiny_dataset(4), "eval_dataset": tiny_dataset(2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seecal.trainer.cal_trainer.check_reporting", lambda args: None)
        patch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [Recorder])
        CALTrainer(tiny_llava(), args, processing_class=tiny_llava_processor(), **settings).train()
    (said,) = [one.message for one in caplog.records if "cannot show tokens" in one.message]
    assert "report_to='mlflow' cannot" in said
    assert steps_of(wandb) == [0, 1]


def test_tensorboard_has_the_text_and_the_histogram(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin = pytest.importorskip("tensorboard.plugin_util")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer_of(tmp_path, logging_tokens_steps=3, report_to=["tensorboard"], max_steps=4).train()
    events = accumulator.EventAccumulator(str(tmp_path / "events"), {"tensors": 0, "histograms": 0})
    events.Reload()
    texts = events.Tensors(f"{ANSWER}/text_summary")
    histograms = events.Histograms(DELTA)
    assert [one.step for one in texts] == [one.step for one in histograms] == [0, 3]
    page = plugin.markdown_to_safe_html(texts[0].tensor_proto.string_val[0])
    rows = page.count("<tr>") - 1
    assert histograms[0].histogram_value.num == rows > 3
    assert "🟪" in page or "🟧" in page or "+0." in page
    assert "loss" in " ".join(events.Tags()["scalars"]), "in the file of the other logs"


# ---- Tokens' texts ----


class Bytes:
    """A tokenizer of UTF-8 bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf8", errors="replace")


@pytest.mark.parametrize("text", ["a b", "x😀y", "猫 é", "😀"])
def test_texts_of_tokens_join_to_the_whole(text):
    ids = list(text.encode())
    texts = token_texts(Bytes(), ids)
    assert "".join(texts) == text
    assert len(texts) == len(ids)
    assert "\ufffd" not in "".join(texts)


# ---- Beside what else watches ----


def test_its_image_is_not_that_of_a_step(tmp_path, wandb):
    """GradientCheck looks at the first step with an image: without one the projector rightly has no gradient."""
    args = sgd_config(tmp_path, 2, 1, max_steps=2, logging_tokens_steps=1)
    trainer = CALTrainer(
        tiny_llava(), args, train_dataset=[TEXT_ONLY] * 4, eval_dataset=tiny_records(2),
        processing_class=tiny_llava_processor(), callbacks=[GradientCheck(), Recorder()],
    )  # fmt: skip
    trainer.train()
    assert steps_of(wandb) == [0, 1, 2]


def test_its_time_is_no_part_of_the_speed(tmp_path, wandb, monkeypatch):
    clock = itertools.count(step=1000)  # seconds, at each look
    monkeypatch.setattr(token_logging, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = trainer_of(tmp_path, logging_tokens_steps=1, callbacks=[Recorder()], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["tokens_per_second"] > 1e9, "what is left of the time is none"


def test_two_ranks(tmp_path):
    """One rank alone measures under DDP, both with sharded parameters; neither waits for the other, one logs."""
    two_ranks(ROOT / "tests" / "support" / "token_logging_worker.py", tmp_path, cwd=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [rank["steps"] for rank in ranks] == [[0, 2, 4], []]
    assert ranks[0]["losses"] == ranks[0]["plain losses"]
    assert len(ranks[0]["losses"]) == 4
    for rank in ranks:
        assert all(torch.equal(one, rank["plain weights"][name]) for name, one in rank["weights"].items())
    whole = ranks[0]["whole"]
    assert whole.abs().max() > 1e-3
    assert torch.allclose(ranks[0]["sharded"], whole.expand(2, -1), atol=1e-5), "two logs"
    assert len(ranks[1]["sharded"]) == 0
