"""A run goes on with the data, order and batches that its checkpoint was written with, or says why it cannot."""

import json
import random
import re
import shutil

import numpy
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from seecal import CALTrainer
from seecal.trainer.checkpoints import checkpoints_in, damage
from seecal.trainer.fingerprint import fingerprint, what_differs
from seecal.trainer.manifests import MANIFEST, write_manifest
from tests.support.processes import two_ranks
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records

TIMED = ("tokens_per_second", "data_wait_share", "train_", "host_memory")


class Told(CALTrainer):
    """Keeps the records and the loss of each step of this rank."""

    def _stop_unless_finite(self, loss, norm):
        super()._stop_unless_finite(loss, norm)
        self.__dict__.setdefault("steps", {})[self.state.global_step + 1] = sorted(self._watch.records), loss.item()


def trainer(folder, data, batch_size=4, accumulation=1, **changes):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_checkpointing": False}
    settings |= {"train_sampling_strategy": "random", **changes}
    args = sgd_config(folder, batch_size, accumulation, **settings)
    return Told(tiny_llava(), args, train_dataset=data, processing_class=tiny_llava_processor())


def logs(this):
    return [
        {name: value for name, value in entry.items() if not name.startswith(TIMED)} for entry in this.state.log_history
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a run of six steps over 24 records, its folder with the checkpoint of step 3)."""
    folder = tmp_path_factory.mktemp("whole")
    this = trainer(folder, tiny_dataset(24))
    this.train()
    return this, folder


def resumed(whole, folder, data, *batches, **changes):
    shutil.copytree(whole[1] / "checkpoint-3", folder / "checkpoint-3")
    this = trainer(folder, data, *batches, **changes)
    this.train(resume_from_checkpoint=True)
    return this


# ---- What is summed up between two logs ----


def test_sums_since_the_last_log_go_on(tmp_path):
    changes = {"logging_steps": 4, "save_steps": 5, "max_steps": 8}
    one = trainer(tmp_path / "one", tiny_dataset(12), 2, **changes)
    one.train()
    shutil.copytree(tmp_path / "one" / "checkpoint-5", tmp_path / "two" / "checkpoint-5")
    two = trainer(tmp_path / "two", tiny_dataset(12), 2, **changes)
    output = two.train(resume_from_checkpoint=True)
    assert logs(two) == logs(one)
    last = [loss for step, (_, loss) in one.steps.items() if step > 5]
    assert output.training_loss == pytest.approx(sum(last) / 3, rel=1e-5), "that of this call's steps"


@pytest.mark.parametrize("stream", [False, True])
def test_after_the_last_step_there_is_none(tmp_path, stream):
    """A kill between the last checkpoint and the end of the run; the epoch is not at its end."""
    rows = without_images(10)
    data = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    one = trainer(tmp_path, data, max_steps=4, save_steps=4)
    one.train()
    two = trainer(tmp_path, data, max_steps=4, save_steps=4)
    two.train(resume_from_checkpoint=True)
    assert two.state.global_step == 4
    assert not hasattr(two, "steps"), "none was taken"
    assert logs(two) == logs(one)
    assert all(torch.equal(value, two.model.state_dict()[name]) for name, value in one.model.state_dict().items())
    longer = trainer(tmp_path, data, max_steps=6, save_steps=4)
    longer.train(resume_from_checkpoint=True)
    assert list(longer.steps) == [5, 6]


# ---- The data ----


class Made(TorchDataset):
    """A torch data set."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


FORMS = {"a set": lambda rows: Dataset.from_list(rows), "a list": list, "a torch data set": Made}


def without_images(n):
    return [{"id": row["id"], "messages": row["messages"]} for row in tiny_records(n)]


def another_answer(rows):
    rows[5]["messages"][1]["content"] = "It is."
    return rows


CHANGES = {
    "fewer": (lambda rows: rows[:-1], "begun with 12 records, and this is 11 records"),
    "an answer": (another_answer, "record 5( .'r5'.)? is another"),
    "another order": (lambda rows: [rows[1], rows[0], *rows[2:]], "record 0( .'r1'.)? is another"),
    "another name": (lambda rows: [*rows[:11], {**rows[11], "id": "x"}], "record 11( .'x'.)? is another"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_named(form, change):
    before, after = FORMS[form](without_images(12)), FORMS[form](CHANGES[change][0](without_images(12)))
    was = json.loads(json.dumps(fingerprint(before)))
    assert what_differs(was, fingerprint(FORMS[form](without_images(12))), before) is None
    assert re.search(CHANGES[change][1], what_differs(was, fingerprint(after), after))


def rows_with(path, size):
    rows = without_images(4)
    return [{**row, "images": [{"path": path, "bytes": None}, {"path": None, "bytes": b"x" * size}]} for row in rows]


@pytest.mark.parametrize("form", ["a set", "a list"])
def test_images_are_told_by_their_names_and_sizes_and_not_read(form):
    make = FORMS[form]
    before = fingerprint(make(rows_with("/no/such/images/a.png", 30)))
    assert fingerprint(make(rows_with("/moved/images/a.png", 30))) == before, "a folder that was moved"
    assert fingerprint(make(rows_with("/no/such/images/b.png", 30))) != before
    assert fingerprint(make(rows_with("/no/such/images/a.png", 31))) != before


class Drawn(Made):
    """Draws while it makes a sample, as one that augments does."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        draws = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
        return {**row, "image": torch.rand(3, 4 + int(draws[0] * 9), 4), "drawn": draws}


class Fails(Made):
    def __getitem__(self, index):
        if index == 2:
            raise OSError("a damaged image")
        return {**super().__getitem__(index), "image": object(), "score": numpy.float32(0.5), "n": torch.tensor(1)}


def test_looking_at_samples_that_are_made_changes_nothing():
    rows = without_images(4)
    drawn = Drawn(rows)
    for draw in (random.random, numpy.random.rand, lambda: float(torch.rand(()))):
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        expected = draw()
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        was = fingerprint(drawn)
        assert draw() == expected
        assert fingerprint(drawn) == was
    one, other = fingerprint(Fails(rows)), fingerprint(Fails(another_answer(without_images(8))[2:6]))
    assert one == fingerprint(Fails(rows))
    assert what_differs(one, other, Fails(rows)) == "record 0 is another than it was begun with"


def test_it_is_small_and_looks_at_a_thousand():
    rows = [{"id": str(number), "messages": "a"} for number in range(20_000)]
    data = Dataset.from_list(rows)
    found = fingerprint(data)
    assert len(json.dumps(found)) < 16_000
    rows[-1] = {"id": "x", "messages": "a"}
    other = Dataset.from_list(rows)
    assert what_differs(found, fingerprint(other), other) == "record 19999 ('x') is another than it was begun with"
    more = other.add_column("weight", [1] * 20_000)
    assert "columns were id, messages, and are id, messages, weight" in what_differs(found, fingerprint(more), more)


def test_a_run_does_not_go_on_with_other_data(whole, tmp_path, caplog):
    other = tiny_dataset(24, 1)
    with pytest.raises(
        ValueError, match=r"checkpoint-3: train_dataset is not the one .* record 0 \('r0'\) is another"
    ) as no:
        resumed(whole, tmp_path / "no", other)
    assert "Give the data that it was begun with, or set ignore_data_skip=True" in str(no.value)
    assert "\n" not in str(no.value)
    this = resumed(whole, tmp_path / "yes", other, ignore_data_skip=True)
    assert this.state.global_step == 6
    assert "It goes on with ignore_data_skip=True all the same" in caplog.text


def test_a_checkpoint_that_does_not_say_its_data(whole, tmp_path, caplog):
    old = tmp_path / "checkpoint-3"
    shutil.copytree(whole[1] / "checkpoint-3", old)
    write_manifest(old, {"step": 3, "ranks": 1})
    this = trainer(tmp_path, tiny_dataset(24))
    this.train(resume_from_checkpoint=True)
    assert this.steps == {step: told for step, told in whole[0].steps.items() if step > 3}
    assert "checkpoint-3 does not say what data it was written with: they may be others" in caplog.text


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 2)])
def test_a_stream_that_has_begun_again(tmp_path, workers, accumulation):
    """Ten records, of which a step takes four: the checkpoint is in the middle of the second pass or of a later one."""
    rows = without_images(10)
    data = IterableDataset.from_generator(lambda: iter(rows)).shuffle(seed=1, buffer_size=4)
    changes = {"max_steps": 7, "save_steps": 2, "dataloader_num_workers": workers}
    one = trainer(tmp_path / "one", data, 4 // accumulation, accumulation, **changes)
    one.train()
    for step in (4, 6):
        part = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "one" / f"checkpoint-{step}", part / f"checkpoint-{step}")
        two = trainer(part, data, 4 // accumulation, accumulation, **changes)
        two.train(resume_from_checkpoint=True)
        assert two.steps == {number: told for number, told in one.steps.items() if number > step}
        assert json.loads((part / f"checkpoint-{step}" / MANIFEST).read_text())["data"] == {"records": None}


def only_some_with_images(n, without):
    rows = tiny_records(n)
    for index in without:
        rows[index]["images"] = []
    return rows


SPARSE = {
    "one has an image": (1, 3, 5, 7),
    "the first alone": (1, 2, 3, 4, 5, 6, 7),
    "some batches": (1, 2, 3, 5),
}


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("form", ["a list", "a stream"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_an_image_is_swapped_with_does_not_depend_on_where_the_run_began(tmp_path, form, sparse, workers):
    """The image of an earlier batch is one that this process has seen. Of two records in a batch one or none has any."""
    rows = only_some_with_images(8, SPARSE[sparse])
    data = rows if form == "a list" else IterableDataset.from_generator(lambda: iter(rows))
    changes = {"contrast": "swap", "max_steps": 6, "save_steps": 1, "train_sampling_strategy": "sequential"}
    changes["dataloader_num_workers"] = workers
    one = trainer(tmp_path / "one", data, 2, **changes)
    one.train()
    measured = [entry.get("delta_mean") for entry in logs(one)[:-1]]
    if form == "a list":
        lonely = sparse == "the first alone"  # in the whole data: nothing to swap it with
        assert (measured[0] is None) == lonely
        assert any(value is not None for value in measured) != lonely
    for step in (1, 3):
        part = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "one" / f"checkpoint-{step}", part / f"checkpoint-{step}")
        two = trainer(part, data, 2, **changes)
        two.train(resume_from_checkpoint=True)
        assert logs(two) == logs(one)


# ---- Order and batches ----

REFUSED = {
    "another seed": ({"seed": 7}, r"seed of the order .* was 42, is 7. Set data_seed=42"),
    "another strategy": ({"train_sampling_strategy": "sequential"}, r"strategy was 'random', is 'sequential'"),
    "another step": (
        {"gradient_accumulation_steps": 2},
        r"1 ranks x 4 x 1, is 1 ranks x 4 x 2: a step had 4 records and would have 8\. Set per_device_train_batch_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_another_order_is_refused(whole, tmp_path, what):
    changes, says = dict(REFUSED[what][0]), REFUSED[what][1]
    accumulation = changes.pop("gradient_accumulation_steps", 1)
    with pytest.raises(ValueError, match=says):
        resumed(whole, tmp_path, tiny_dataset(24), 4, accumulation, **changes)


def same_steps(one, two, first):
    assert sorted(two) == [step for step in sorted(one) if step > first]
    for step, (ids, loss) in two.items():
        assert ids == one[step][0], step
        assert loss == pytest.approx(one[step][1], abs=1e-5), step


def test_the_same_steps_cut_in_another_way(whole, tmp_path):
    this = resumed(whole, tmp_path, tiny_dataset(24), 2, 2)
    same_steps(whole[0].steps, this.steps, 3)


CUTS = {
    "by length": (
        {"train_sampling_strategy": "group_by_length"},
        24,
        r"'group_by_length' makes batches for so many ranks",
    ),
    "averages": ({"normalize": "sample"}, 24, r"normalize='sample' averages inside each rank's batch"),
    "swapped images": ({"contrast": "swap"}, 24, r"contrast='swap' takes an image of the same rank's batch"),
    "what is left": ({"max_steps": 7}, 26, r"26 records are no whole number of steps of 4"),
    "a stream": ({}, None, r"a stream is cut into batches before they are dealt out"),
}


@pytest.mark.parametrize("what", CUTS)
def test_where_it_would_not_be_the_same_it_is_refused(tmp_path, what):
    changes, count, says = CUTS[what]
    rows = without_images(30)
    data = IterableDataset.from_generator(lambda: iter(rows)) if count is None else tiny_dataset(count)
    this = trainer(tmp_path, data, **{"max_steps": 4, **changes})
    this.args.max_steps = 3
    this.train()
    other = trainer(tmp_path, data, 2, 2, **{"max_steps": 4, **changes})
    with pytest.raises(ValueError, match=says + r".*\. Launch it with 1 ranks x 4 x 1, or set ignore_data_skip=True"):
        other.train(resume_from_checkpoint=True)


RANK = """
import json
import sys
from pathlib import Path

import torch

from seecal.ops.distributed import leave
from tests.support.tiny import tiny_dataset
from tests.trainer.test_resuming import trainer

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
this = trainer(folder / "ranks", tiny_dataset(24), 2)
this.train()
again = trainer(folder / "wider", tiny_dataset(24), 2)
again.train(resume_from_checkpoint=True)
found = {"two": this.steps, "wider": again.steps}
(folder / f"steps-{again.args.process_index}.json").write_text(json.dumps(found))
torch.distributed.barrier()
leave(0)
"""


def test_two_ranks_and_one(whole, tmp_path):
    """Two ranks with two records each go on as one with four, and the other way round; and not as one with two."""
    (tmp_path / "rank.py").write_text(RANK)
    shutil.copytree(whole[1] / "checkpoint-3", tmp_path / "wider" / "checkpoint-3")
    two_ranks(tmp_path / "rank.py", tmp_path)
    of_ranks = [json.loads((tmp_path / f"steps-{rank}.json").read_text()) for rank in range(2)]
    for name, first in (("two", 0), ("wider", 3)):
        ranks = [one[name] for one in of_ranks]
        both = {int(step): (sorted(ids + ranks[1][step][0]), loss) for step, (ids, loss) in ranks[0].items()}
        same_steps(whole[0].steps, both, first)
    narrow = tmp_path / "narrow"
    shutil.copytree(tmp_path / "ranks" / "checkpoint-3", narrow / "checkpoint-3")
    with pytest.raises(
        ValueError, match=r"was 2 ranks x 2 x 1, is 1 ranks x 2 x 1: a step had 4 records and would have 2"
    ):
        trainer(narrow, tiny_dataset(24), 2).train(resume_from_checkpoint=True)
    this = trainer(narrow, tiny_dataset(24), 4)
    this.train(resume_from_checkpoint=True)
    same_steps(whole[0].steps, this.steps, 3)
    assert [entry["num_tokens"] for entry in logs(this)[:-1]] == [entry["num_tokens"] for entry in logs(whole[0])[:-1]]
    assert all(damage(one) is None for one in checkpoints_in(narrow))
