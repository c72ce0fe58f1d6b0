"""Steps of one modality, against a plain retelling of the original's order."""

import random

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler

from seecal import CALTrainer, load_records
from seecal.recipes.tiny import tiny_folder
from seecal.trainer.sampling import ModalityByEpoch, lengths_by_modality
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records

CASES = {
    "mostly images": (103, 0.8, 4, 3),
    "half and half": (64, 0.5, 2, 4),
    "all images": (40, 1.0, 4, 2),
    "all text": (40, 0.0, 4, 2),
    "less than a step": (5, 0.5, 4, 2),
    "one record": (1, 1.0, 1, 1),
    "batches of one": (33, 0.6, 1, 5),
}


def drawn(case, seed=0):
    """(lengths, with_image, batch size, micro-batches of a step) of a case."""
    count, share, batch_size, batches = CASES[case]
    numbers = random.Random(seed)
    return (
        [numbers.randint(0, 500) for _ in range(count)],
        [numbers.random() < share for _ in range(count)],
        batch_size,
        batches,
    )


def sampler(case, seed=0):
    lengths, with_image, batch_size, batches = drawn(case)
    return ModalityByEpoch(lengths, with_image, batch_size=batch_size, batches=batches, seed=seed)


def cut(order, size):
    return [order[i : i + size] for i in range(0, len(order), size)]


def dealt(step, lengths, batch_size, batches):
    """A step's records, the longest first, each to the lightest micro-batch with room (the first of several)."""
    chunks, totals = [[] for _ in range(batches)], [0] * batches
    for record in sorted(step, key=lambda i: -lengths[i]):
        number = min((n for n in range(batches) if len(chunks[n]) < batch_size), key=lambda n: totals[n])
        chunks[number].append(record)
        totals[number] += lengths[record]
    return [sum(lengths[i] for i in chunk) for chunk in chunks]


@pytest.mark.parametrize("case", CASES)
def test_every_step_has_one_modality_and_the_rest_comes_last(case):
    lengths, with_image, batch_size, batches = drawn(case)
    order, of_a_step = list(sampler(case)), batch_size * batches
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler(case)) == len(order)
    counts = {kind: with_image.count(kind) for kind in (True, False)}
    whole = {kind: count // of_a_step for kind, count in counts.items()}
    steps = cut(order, of_a_step)
    pure = steps[: sum(whole.values())]
    kinds = [{with_image[i] for i in step} for step in pure]
    assert all(len(one) == 1 for one in kinds)
    assert {kind: kinds.count({kind}) for kind in (True, False)} == whole
    rest = order[sum(whole.values()) * of_a_step :]
    assert rest == sorted(rest)
    assert {kind: sum(with_image[i] is kind for i in rest) for kind in counts} == {
        kind: count % of_a_step for kind, count in counts.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_the_micro_batches_of_a_step_are_about_equally_long(case):
    lengths, with_image, batch_size, batches = drawn(case)
    of_a_step = batch_size * batches
    whole = sum(with_image.count(kind) // of_a_step for kind in (True, False))
    for step in cut(list(sampler(case)), of_a_step)[:whole]:
        found = [sum(lengths[i] for i in chunk) for chunk in cut(step, batch_size)]
        assert found == dealt(step, lengths, batch_size, batches)


def test_the_order_follows_the_seed_and_the_epoch_and_nothing_else():
    one = sampler("mostly images")
    first = list(one)
    torch.seed()
    assert list(one) == first == list(sampler("mostly images"))
    one.set_epoch(1)
    second = list(one)
    assert second != first
    assert sorted(second) == sorted(first)
    again = sampler("mostly images")
    again.set_epoch(1)
    assert list(again) == second, "as a resumed process draws it"
    assert list(sampler("mostly images", seed=7)) != first


def test_steps_of_both_kinds_are_mixed():
    _, with_image, batch_size, batches = drawn("half and half")
    of_a_step = batch_size * batches
    whole = sum(with_image.count(kind) // of_a_step for kind in (True, False))
    kinds = [with_image[step[0]] for step in cut(list(sampler("half and half")), of_a_step)[:whole]]
    assert sorted(kinds) != kinds != sorted(kinds, reverse=True)


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 2), (4, 1), (1, 4)])
def test_all_ranks_have_the_same_modality_in_a_step(ranks, accumulation):
    """As accelerate deals the batches out."""
    lengths, with_image, batch_size, _ = drawn("half and half")
    batches = ranks * accumulation
    whole = sum(with_image.count(kind) // (batch_size * batches) for kind in (True, False))
    shards = []
    for rank in range(ranks):
        order = ModalityByEpoch(lengths, with_image, batch_size=batch_size, batches=batches, seed=3)
        shards.append(list(BatchSamplerShard(BatchSampler(order, batch_size, False), ranks, rank)))
    for step in range(whole):
        of_step = [batch for shard in shards for batch in shard[step * accumulation : (step + 1) * accumulation]]
        assert len({with_image[i] for batch in of_step for i in batch}) == 1
        assert len({i for batch in of_step for i in batch}) == batch_size * batches


# ---- in the trainer ----


def mixed(n):
    """Every third record without an image."""
    rows = tiny_records(n)
    for index, row in enumerate(rows):
        row["images"] = [] if index % 3 == 2 else (row["images"] or rows[0]["images"])
    return rows


def trainer(folder, data, **changes):
    settings = {"max_steps": -1, "num_train_epochs": 1, "gradient_checkpointing": False, **changes}
    settings |= {"train_sampling_strategy": "group_by_modality_length"}
    args = sgd_config(folder, settings.pop("batch_size", 2), settings.pop("accumulation", 1), **settings)
    return CALTrainer(tiny_llava(), args, train_dataset=data, processing_class=tiny_llava_processor())


class Seen(CALTrainer):
    """Which micro-batches had pixels, in order."""

    def training_step(self, model, inputs, *args):
        self.seen = [*getattr(self, "seen", []), "pixel_values" in inputs]
        return super().training_step(model, inputs, *args)


def test_a_training_meets_one_modality_a_step(tmp_path):
    rows = mixed(24)
    args = sgd_config(
        tmp_path, 2, 2, max_steps=-1, num_train_epochs=1, gradient_checkpointing=False,
        train_sampling_strategy="group_by_modality_length",
    )  # fmt: skip
    this = Seen(tiny_llava(), args, train_dataset=rows, processing_class=tiny_llava_processor())
    this.train()
    steps = cut(this.seen, 2)
    assert [sorted(map(sum, steps)).count(pixels) for pixels in (0, 1, 2)] == [2, 0, 4], "8 texts, 16 with an image"


def test_images_are_told_without_being_opened(tmp_path):
    expected = [index % 3 != 2 for index in range(6)]
    rows = mixed(6)
    as_set = Dataset.from_list(rows, features=tiny_dataset(1).features)
    assert lengths_by_modality(rows, "length")[1] == expected
    lengths, found = lengths_by_modality(as_set, "length")
    assert found == expected
    assert min(n for n, one in zip(lengths, found, strict=True) if one) > 576
    assert lengths_by_modality(as_set.add_column("length", [1, 2, 3, 4, 5, 6]), "length") == (
        [1, 2, 3, 4, 5, 6],
        expected,
    )
    records = load_records(tiny_folder(tmp_path) / "data.json")
    assert lengths_by_modality(records, "length")[1] == [bool(row["images"]) for row in records]


def test_what_cannot_be_put_in_that_order_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a stream is read in its order"):
        trainer(tmp_path, tiny_dataset(4).to_iterable_dataset(), max_steps=1).train()
    transformed = tiny_dataset(2).with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match=r"Give it a column 'length'"):
        trainer(tmp_path, transformed).train()
    with pytest.raises(ValueError, match=r"nothing tells which samples of a Dataset have an image"):
        lengths_by_modality(tiny_dataset(2).add_column("length", [1, 2]).with_transform(lambda rows: rows), "length")
    with pytest.raises(ValueError, match=r"='group_by_modality': expected one of random, sequential"):
        sgd_config(tmp_path, 1, 1, train_sampling_strategy="group_by_modality")
