"""The same 8 records a step, however they are split into micro-batches, give the same losses and weights."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from seecal import CALConfig, CALTrainer
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records

STEPS = 4


def train(folder, batch_size, accumulation, n=32, **changes):
    """(losses, final weights, log) of 4 SGD steps in float32 over the same ``n`` records in order."""
    args = sgd_config(folder, batch_size, accumulation, **{"max_steps": STEPS, **changes})
    trainer = CALTrainer(tiny_llava(), args, train_dataset=tiny_dataset(n), processing_class=tiny_llava_processor())
    trainer.train()
    log = [one for one in trainer.state.log_history if "loss" in one]
    return [one["loss"] for one in log], {**trainer.model.state_dict()}, log


def distance(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), 8, 1)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (1, 8), (3, 3)])
@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_global_does_not_see_the_split(tmp_path, batch_size, accumulation, clip):
    reference = train(tmp_path / "whole", batch_size * accumulation, 1, max_grad_norm=clip)
    losses, weights, log = train(tmp_path / "split", batch_size, accumulation, max_grad_norm=clip)
    assert distance(tiny_llava().state_dict(), weights) >= 1e-3, "the weights move"
    assert losses == pytest.approx(reference[0], abs=1e-5)
    assert distance(weights, reference[1]) <= 1e-5
    for name in ("cross_entropy", "delta_mean", "share_inside", "label_tokens", "grad_norm", "num_tokens"):
        assert [one[name] for one in log] == pytest.approx([one[name] for one in reference[2]], rel=1e-4), name


def test_a_short_last_step(tmp_path):
    """20 records: steps of 8, 8 and 4, the last of one micro-batch where the others have two."""
    whole = train(tmp_path / "whole", 8, 1, n=20, max_steps=-1, num_train_epochs=2)
    split = train(tmp_path / "split", 4, 2, n=20, max_steps=-1, num_train_epochs=2)
    assert len(split[0]) == 6
    assert split[0] == pytest.approx(whole[0], abs=1e-5)
    assert distance(split[1], whole[1]) <= 1e-5


def test_some_weights_lie_inside_the_clamp(whole):
    assert any(one["share_inside"] > 0.1 for one in whole[2]), "else CAL would be the plain loss here"


def test_micro_batch_sees_the_split_as_the_released_code_does(tmp_path, whole):
    losses, weights, _ = train(tmp_path / "split", 1, 8, normalize="micro_batch")
    assert distance(weights, whole[1]) > 1e-4
    one_piece = train(tmp_path / "whole", 8, 1, normalize="micro_batch")
    assert one_piece[0] == pytest.approx(whole[0], abs=1e-5)
    assert abs(losses[0] - whole[0][0]) > 1e-3


def test_sample_does_not_see_the_split_of_equal_parts(tmp_path):
    whole = train(tmp_path / "whole", 8, 1, normalize="sample")
    split = train(tmp_path / "split", 2, 4, normalize="sample")
    assert split[0] == pytest.approx(whole[0], abs=1e-5)
    assert distance(split[1], whole[1]) <= 1e-5


def test_checkpointing_changes_nothing(tmp_path, whole):
    losses, weights, _ = train(tmp_path, 4, 2, gradient_checkpointing=False)  # TRL's default is True
    assert losses == pytest.approx(whole[0], abs=1e-5)
    assert distance(weights, whole[1]) <= 1e-5


def test_eval_loss_is_the_mean_over_tokens(tmp_path):
    """7 records of uneven length in batches of 3, 3 and 1: not the mean of batch means."""
    processor, model = tiny_llava_processor(), tiny_llava()
    args = CALConfig(
        str(tmp_path), per_device_eval_batch_size=3, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
    )
    data = tiny_dataset(7, seed=3)
    trainer = CALTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=processor)
    metrics = trainer.evaluate()

    plain, records = tiny_llava().eval(), tiny_records(7, seed=3)
    nll, tokens, right, means = 0.0, 0, 0, []
    for start in (0, 3, 6):
        batch = trainer.data_collator(records[start : start + 3])
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            logits = plain(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
        here = cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
        nll, tokens = nll + here, tokens + (labels != -100).sum().item()
        right += ((logits.argmax(-1) == labels) & (labels != -100)).sum().item()
        means.append(here / (labels != -100).sum().item())
    assert metrics["eval_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(right / tokens)
    assert metrics["eval_label_tokens"] == tokens
    assert abs(metrics["eval_loss"] - sum(means) / 3) > 1e-3, "batches are uneven"
    assert model.eval()(**batch).loss.item() == pytest.approx(means[-1], rel=1e-5)
