"""Settings and figures that get lost between the config, the collator, the trainer and its log."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from seecal import CALConfig, CALTrainer
from seecal.trainer.metrics import token_metrics
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records


def trainer_of(folder, n=8, **changes):
    args = sgd_config(folder, 4, 1, **changes)
    data = {"train_dataset": tiny_dataset(n), "eval_dataset": tiny_dataset(4)}
    return CALTrainer(tiny_llava(), args, processing_class=tiny_llava_processor(), **data)


@pytest.mark.parametrize("decoding", ["exact", "reduced"])
def test_image_decoding_reaches_the_collator(decoding, tmp_path):
    assert trainer_of(tmp_path, image_decoding=decoding).data_collator.decoding == decoding


@pytest.mark.parametrize("padding_free", ["auto", True, False])
def test_the_config_is_as_it_was_after_the_trainer_was_made(padding_free, tmp_path):
    trainer = trainer_of(tmp_path, padding_free=padding_free)
    assert trainer.args.padding_free == padding_free
    assert trainer.cal_options.padding_free == padding_free


def test_tokens_are_counted_without_padding(tmp_path):
    trainer = trainer_of(tmp_path, padding_free=False, max_steps=1)
    batch = trainer.data_collator(tiny_records(4))
    real, columns = int(batch["attention_mask"].sum()), batch["input_ids"].numel()
    trainer.train()
    assert real < columns
    assert next(entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry) == real


def test_shares_add_up():
    sums = {"cross_entropy": 1.0, "label_tokens": 10, "seen": 8, "delta": 4.0, "at_alpha": 2, "at_beta": 1}
    found = token_metrics({**sums, "contrast": 5, "main": 15, "tokens": 15})
    shares = [found[f"share_{name}"] for name in ("at_alpha", "inside", "at_beta")]
    assert shares == [0.25, 0.625, 0.125]
    assert found["delta_mean"] == 0.5


def test_the_loss_of_an_evaluation_batch_is_its_mean_over_tokens(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = trainer.data_collator(tiny_records(4))
    model = tiny_llava().eval()
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
    expected = float(cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:]))
    found = trainer.compute_loss(trainer.model.eval(), dict(batch))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_that_was_stopped_does_not_count_in_the_next(tmp_path):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=2)
    expected = trainer.evaluate()
    step, calls = trainer.prediction_step, []

    def stopped(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*given, **named)

    trainer.prediction_step = stopped
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    trainer.prediction_step = step
    again = trainer.evaluate()
    for name in ("eval_loss", "eval_label_tokens", "eval_entropy"):
        assert again[name] == pytest.approx(expected[name]), name


def test_tokens_of_one_rank_are_refused_where_those_of_all_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(CALConfig, "world_size", property(lambda self: 2))
    settings = {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False}
    with pytest.raises(ValueError, match=r"average_tokens_across_devices=False with .*gradient_accumulation_steps=2"):
        CALConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    CALConfig(str(tmp_path), use_cpu=True, bf16=False, **settings, normalize="micro_batch")
