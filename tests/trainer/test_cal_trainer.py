"""CALTrainer: what stops it, what it refuses, and what of SFTTrainer's keeps working."""

import inspect
import math
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import SFTTrainer

import seecal
from seecal import CALConfig, CALTrainer
from seecal.data.collators.checked import CheckedCollator
from seecal.data.collators.vision import VisionCollator
from seecal.trainer.metrics import WaitHint, Waiting
from tests.support.tiny import (
    IMAGE_TOKENS,
    tiny_dataset,
    tiny_llava,
    tiny_llava_processor,
    tiny_records,
    tiny_tokenizer,
)


def config(folder, **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return CALConfig(str(folder), **{**settings, **changes})


def trainer(folder, model=None, *, changes=None, data=None, **kwargs):
    return CALTrainer(
        tiny_llava() if model is None else model,
        config(folder, **(changes or {})),
        train_dataset=tiny_dataset(16) if data is None else data,
        processing_class=tiny_llava_processor(),
        **kwargs,
    )


def prompt_completion(n):
    rows = tiny_dataset(n)
    return rows.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns="messages"
    )


class Spoil(TrainerCallback):
    """Puts a NaN or an infinity into the model before the second step."""

    def __init__(self, value):
        self.value, self.kept = value, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                model.lm_head.weight[5, 0] = self.value
            self.kept = model.model.multi_modal_projector.linear_1.weight.clone()


@pytest.mark.parametrize("normalize", ["global", "micro_batch", "sample", "tokens", "matched"])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, normalize):
    model, spoil = tiny_llava(), Spoil(math.nan)
    changes = {"normalize": normalize, "gradient_accumulation_steps": 2}
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is nan.*before the optimizer step"):
        trainer(tmp_path, model, changes=changes, callbacks=[spoil]).train()
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, spoil.kept)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    model = tiny_llava()
    model.model.multi_modal_projector.linear_1.weight.register_hook(lambda grad: grad * math.inf)
    before = model.lm_head.weight.clone()
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is \d.* and the gradient norm (nan|inf)"):
        trainer(tmp_path, model).train()
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_micro_batch_without_labels_counts_nothing(tmp_path, accumulation):
    collate = VisionCollator(tiny_llava_processor())

    def partly(records):
        batch = collate(records)
        if records[0]["id"] in ("r0", "r4"):  # the first two batches of the first run; the first of the second
            batch["labels"].fill_(-100)
        return batch

    changes = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": accumulation, "max_steps": 2}
    this = trainer(tmp_path, changes=changes, data_collator=partly)
    before = {name: one.clone() for name, one in this.model.state_dict().items()}
    this.train()
    assert this.state.log_history[0]["loss"] == 0
    assert this.state.log_history[0]["label_tokens"] == 0
    if accumulation == 1:  # both steps
        assert all(torch.equal(one, before[name]) for name, one in this.model.state_dict().items())
    else:
        assert this.state.log_history[1]["loss"] > 1


def test_collators_are_chosen_by_the_data(tmp_path):
    assert isinstance(trainer(tmp_path).data_collator, VisionCollator)
    given = VisionCollator(tiny_llava_processor(), max_length=999)
    assert trainer(tmp_path, data_collator=given).data_collator is given
    this = trainer(tmp_path, data=prompt_completion(8))
    assert isinstance(this.data_collator, CheckedCollator)
    this.train()
    assert this.state.log_history[0]["label_tokens"] > 0


def test_too_long_is_an_error_for_either_kind_of_data(tmp_path):
    for data in (tiny_dataset(8), prompt_completion(8)):
        with pytest.raises(ValueError, match=r"record 'r\d': .*max_length=16"):
            trainer(tmp_path, changes={"max_length": IMAGE_TOKENS, "on_long": "error"}, data=data).train()


def test_the_default_cuts_text_and_stops_only_at_an_image(tmp_path, caplog):
    """SFTTrainer's own max_length of 1024 tokens must not stop what it would train on."""
    for data in (tiny_dataset(8), prompt_completion(8)):
        caplog.clear()
        this = trainer(tmp_path, changes={"max_length": 43, "max_steps": 4}, data=data)
        assert this.args.on_long == "truncate"
        this.train()
        logs = [entry for entry in this.state.log_history if "loss" in entry]
        assert sum(entry["records_truncated"] for entry in logs) > 3
        assert all(entry["records_dropped"] == 0 for entry in logs)
        said = [entry.getMessage() for entry in caplog.records if "is cut from" in entry.getMessage()]
        assert len(said) == 1
        assert re.match(r"record 'r\d' is cut from \d+ tokens to max_length=43", said[0])
        with pytest.raises(ValueError, match=r"record 'r\d': .*an image cannot be cut"):
            trainer(tmp_path, changes={"max_length": IMAGE_TOKENS}, data=data).train()


def test_weights_of_prompts_and_completions_are_honoured(tmp_path):
    data = prompt_completion(4)
    this = trainer(tmp_path, data=data, changes={"max_steps": 1})
    batch = this.data_collator([data[index] for index in range(4)])
    counts = (batch["labels"] != -100).sum(1).tolist()
    weights = [[0.5] * (count - 1) + [3.0] for count in counts]
    with_weights = data.add_column("weights", weights)
    this = trainer(tmp_path, data=with_weights, changes={"max_steps": 1})
    this.train()
    log = this.state.log_history[0]
    assert log["contrast_token_share"] == 0, "no image is taken away"
    assert log["label_tokens"] == sum(counts)
    wrong = data.add_column("weights", [[1.0], *weights[1:]])
    with pytest.raises(ValueError, match=r"record 'r0': 1 weights for \d+ label tokens"):
        trainer(tmp_path, data=wrong, changes={"max_steps": 1}).train()


def test_the_arguments_are_those_of_the_sft_trainer():
    ours, theirs = (inspect.signature(one.__init__).parameters for one in (CALTrainer, SFTTrainer))
    assert list(ours) == list(theirs)
    assert {name: one.default for name, one in ours.items()} == {name: one.default for name, one in theirs.items()}


def test_assistant_only_loss_is_what_we_do_anyway(tmp_path):
    this = trainer(tmp_path, changes={"assistant_only_loss": True, "padding_free": True})
    assert (this.args.assistant_only_loss, this.args.padding_free, this.padding_free) == (True, True, False)
    assert this.cal_options.padding_free is True
    this.train()


@pytest.mark.parametrize("before", [True, False], ids=["PeftModel", "peft_config"])
def test_lora(tmp_path, before):
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    model = PeftModel(tiny_llava(), lora) if before else tiny_llava()
    this = trainer(tmp_path, model, **({} if before else {"peft_config": lora}))
    start = {name: one.clone() for name, one in this.model.named_parameters()}
    this.train()
    for name, parameter in this.model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    this.save_model()
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    batch = this.data_collator([tiny_dataset(1)[0]])
    this.model.eval()
    torch.testing.assert_close(loaded.eval()(**batch).logits, this.model(**batch).logits)


def test_two_stages_on_one_model(tmp_path):
    model = tiny_llava()
    for stage, options in enumerate(({"beta": 2.0}, {"beta": 9.0, "contrast": "mask"})):
        this = trainer(
            tmp_path / str(stage),
            model,
            changes={**options, "eval_strategy": "steps", "eval_steps": 1},
            eval_dataset=tiny_dataset(3),
        )
        this.train()
        assert len([one for one in this.state.log_history if "eval_loss" in one]) == 2
    seecal.disable_cal(model)
    with pytest.raises(ValueError, match="already enabled"):
        trainer(tmp_path, seecal.enable_cal(model))


def test_resume_continues_the_run(tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = trainer(tmp_path, changes=changes)
    whole.train()
    resumed = trainer(tmp_path, changes=changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], parameter, rtol=0, atol=1e-6)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(saved[name], parameter) for name, parameter in whole.model.state_dict().items())


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    changes = {
        "max_steps": 3,
        "learning_rate": 5.0,  # so that the first step's model stays the best
        "optim": "sgd",
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    this = trainer(tmp_path, changes=changes, eval_dataset=tiny_dataset(3))
    this.train()
    losses = [one["eval_loss"] for one in this.state.log_history if "eval_loss" in one]
    assert losses.index(min(losses)) < 2
    assert this.evaluate()["eval_loss"] == pytest.approx(min(losses))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, changes=changes).train()
    other = trainer(tmp_path, tiny_llava(num_hidden_layers=3), changes=changes)
    with pytest.raises(ValueError, match=r"does not hold this model's weights.*missing_keys"):
        other.train(resume_from_checkpoint=True)


def test_a_model_by_its_folder_and_a_stream(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "model")
    tiny_llava_processor().save_pretrained(tmp_path / "model")
    data = tiny_dataset(16).to_iterable_dataset()
    this = CALTrainer(str(tmp_path / "model"), config(tmp_path), train_dataset=data, eval_dataset=data)
    assert isinstance(this.data_collator, VisionCollator)
    this.train()
    assert this.state.log_history[1]["loss"] < this.state.log_history[0]["loss"]
    assert this.evaluate()["eval_label_tokens"] > 16 * 4


def easy_model():
    """A model that always says what ends an answer, and so is right about that."""
    model, processor = tiny_llava().eval(), tiny_llava_processor()
    batch = VisionCollator(processor)(tiny_records(4))
    with torch.no_grad():
        hidden = model.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")})[0]
        model.lm_head.weight[processor.tokenizer.eos_token_id] = hidden.mean((0, 1)) * 10
    return model


def test_metrics_of_a_log_window(tmp_path):
    """The log of two steps against the same two forwards by hand."""
    changes = {"logging_steps": 2, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    this = trainer(tmp_path, easy_model(), changes=changes)
    this.train()
    log = this.state.log_history[0]
    model = seecal.enable_cal(easy_model()).train()
    rows = [tiny_dataset(16)[index] for index in range(8)]
    records = [model(**this.data_collator(rows[start : start + 4])).cal for start in (0, 4)]
    counts = [len(one.visual_delta) for one in records]
    delta = torch.cat([one.visual_delta.delta[one.visual_delta.has_contrast] for one in records])
    assert log["label_tokens"] == sum(counts)
    total = sum(one.cross_entropy.item() * n for one, n in zip(records, counts, strict=True))
    assert log["cross_entropy"] == pytest.approx(total / sum(counts))
    assert log["loss"] == pytest.approx(sum((one.loss_sum / one.weight_sum).item() for one in records) / 2)
    right, plain = 0, easy_model().eval()
    for start in (0, 4):
        batch = this.data_collator(rows[start : start + 4])
        batch = {
            name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "long_records"
        }
        with torch.no_grad():
            likeliest = plain(**batch).logits[:, :-1].argmax(-1)
        right += int((likeliest == batch["labels"][:, 1:]).sum())
    assert log["mean_token_accuracy"] == pytest.approx(right / sum(counts))
    assert right > 5
    assert log["delta_mean"] == pytest.approx(delta.mean().item(), abs=1e-6)
    assert log["share_at_alpha"] == pytest.approx((delta <= 1).float().mean().item())
    assert log["share_at_alpha"] + log["share_inside"] + log["share_at_beta"] == pytest.approx(1)
    slots = [(one.main_tokens, one.contrast_tokens) for one in records]
    assert log["contrast_token_share"] == pytest.approx(sum(one[1] for one in slots) / sum(map(sum, slots)))
    tokens = sum(this.data_collator(rows[start : start + 4])["attention_mask"].sum() for start in (0, 4))
    assert log["num_tokens"] == tokens


class Clock:
    """In the place of the module ``time``: an hour of it passes in no time, and every look at it takes 10 ms."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 0.01
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in ("metrics", "cal_trainer"):
        monkeypatch.setattr(f"seecal.trainer.{module}.time", clock)
    return clock


def test_the_share_of_time_spent_waiting_for_data(tmp_path, clock):
    """A collator that is slow beside the step takes most of the time, also where an evaluation falls into the log."""
    collate = VisionCollator(tiny_llava_processor())

    def share(seconds):
        def slow(records):
            clock.sleep(seconds)
            return collate(records)

        changes = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
        this = trainer(tmp_path, changes=changes, data_collator=slow, eval_dataset=tiny_dataset(24))
        this.train()
        (log,) = (one for one in this.state.log_history if "loss" in one)
        return log["data_wait_share"]

    # One second for each of two batches, and three in the evaluation between them
    fast, slow = share(0.0), share(1.0)
    assert 0 < fast < slow < 1
    assert slow > 0.5


def test_waiting_that_stays_high_is_said_once(caplog):
    hint = WaitHint()
    for share in (0.9, 0.9, 0.1, 0.9, 0.9):
        hint.see(share, 0, "exact")
    assert not caplog.records
    for _ in range(4):
        hint.see(0.45, 0, "exact")
    (record,) = caplog.records
    assert "45 % of the training time" in record.getMessage()
    assert "dataloader_num_workers" in record.getMessage()
    assert "image_decoding='reduced'" in record.getMessage()


def test_waiting_counts_what_the_iterator_takes_and_passes_its_end_on(clock):
    waiting = Waiting(clock.sleep(0.01) or number for number in range(3))
    assert waiting.seconds == 0
    assert list(waiting) == [0, 1, 2]
    assert waiting.seconds >= 0.03


def test_compute_metrics_gets_logits_and_by_default_nothing_does(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"rows": len(prediction.label_ids)}

    this = trainer(tmp_path, eval_dataset=tiny_dataset(5), compute_metrics=metrics)
    result = this.evaluate()
    assert result["eval_rows"] == 5
    assert seen[0][0] == 5
    plain = trainer(tmp_path, eval_dataset=tiny_dataset(5))
    assert plain.evaluate()["eval_loss"] == pytest.approx(result["eval_loss"])
    assert plain.evaluation_loop(plain.get_eval_dataloader(), "x", True).predictions is None


def test_autocast_keeps_the_record(tmp_path):
    this = trainer(tmp_path, changes={"bf16": True, "gradient_accumulation_steps": 2})
    this.train()
    assert this.state.log_history[0]["loss"] > 1


def test_no_image_is_decoded_before_its_batch(tmp_path):
    decoded = []
    data = tiny_dataset(16).with_transform(lambda rows: decoded.append(len(rows["id"])) or rows)
    this = trainer(tmp_path, data=data)
    assert sum(decoded) <= 2, "TRL looks at the first record"
    this.train()
    assert sum(decoded) <= 2 + 4 * 3, "batches of the steps, and one ahead"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.update(args={"output_dir": "x"}), "args is a dict.*CALConfig"),
        (lambda given: given.update(compute_loss_func=lambda *_, **__: 0), "compute_loss_func"),
        (lambda given: setattr(given["args"], "packing", True), "packing=True"),
        (lambda given: setattr(given["args"], "_n_gpu", 2), "nn.DataParallel"),
        (lambda given: given.update(processing_class=tiny_tokenizer()), "does not seem to be a vision-language model"),
    ],
    ids=["a dict", "compute_loss_func", "changed later", "several GPUs", "no processor"],
)  # fmt: skip
def test_what_is_refused(tmp_path, change, message):
    given = {"args": config(tmp_path), "train_dataset": tiny_dataset(4), "processing_class": tiny_llava_processor()}
    change(given)
    with pytest.raises(ValueError, match=message):
        CALTrainer(tiny_llava(), **given)
