"""One bad record does not end a training that asked for that: it is put aside, and another takes its row."""

import io
import json

import pytest
import torch
from datasets import Dataset, Image, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from seecal import CALTrainer
from seecal.data.sources.quarantine_file import QuarantineFile, read_quarantine
from tests.support.processes import two_ranks
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def records(n):
    """All with an encoded image, so that it can be damaged."""
    rows = tiny_records(n)
    image = next(row["images"][0] for row in rows if row["images"])
    for row in rows:
        row["images"] = [{"path": None, "bytes": png(one)} for one in row["images"] or [image]]
    return rows


def damage_image(row):
    row["images"][0]["bytes"] = row["images"][0]["bytes"][:60]


def lose_image(row):
    row["images"] = [{"path": "/no/such/image.png", "bytes": None}]


def take_answer(row):
    row["messages"] = row["messages"][:1]


def one_image_too_many(row):
    row["images"] = row["images"] * 2
    row["messages"][0]["content"] = "<image> What is it?"


def a_video(row):
    row["messages"][0]["content"] = [{"type": "video"}, {"type": "text", "text": "What happens?"}]


KINDS = {
    "a damaged image": (damage_image, "damaged"),
    "no image any more": (lose_image, "no such file"),
    "no answer": (take_answer, "no label"),
    "an image too many": (one_image_too_many, "2"),
    "a video": (a_video, "video"),
}


def trainer(folder, data, batch_size=4, **changes):
    arguments = {name: changes.pop(name) for name in ("eval_dataset", "data_collator") if name in changes}
    settings = {"gradient_checkpointing": False, "on_bad": "skip", "max_steps": 2, **changes}
    args = sgd_config(folder, batch_size, 1, **settings)
    return CALTrainer(tiny_llava(), args, train_dataset=data, processing_class=tiny_llava_processor(), **arguments)


def trained(folder, data, batch_size=4, **changes):
    """(the weights that it ends with, its log, the quarantine)."""
    this = trainer(folder, data, batch_size, **changes)
    this.train()
    logs = [entry for entry in this.state.log_history if "loss" in entry]
    return this.model.state_dict(), logs, read_quarantine(folder / "quarantine.jsonl")


def equal(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_on_the_data_with_the_replacement_in_its_place(tmp_path, kind):
    spoil, says = KINDS[kind]
    data = records(12)
    spoil(data[1])
    with pytest.raises((ValueError, FileNotFoundError), match="r1'"):
        trained(tmp_path / "error", data, on_bad="error")
    weights, logs, found = trained(tmp_path / "skip", data)
    assert [(one["id"], one["where"], one["step"], one["rank"]) for one in found] == [("r1", "training", 1, 0)]
    assert says in found[0]["reason"]
    assert "\n" not in found[0]["reason"]
    assert [entry["records_dropped"] for entry in logs] == [1, 0]
    replaced = records(12)
    replaced[1] = next(row for row in records(12) if row["id"] == found[0]["replaced_by"])
    clean, expected, none = trained(tmp_path / "clean", replaced, on_bad="error")
    assert none == []
    assert equal(weights, clean)
    assert [entry["loss"] for entry in logs] == [entry["loss"] for entry in expected]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_in_workers_and_alone_in_its_batch(tmp_path, workers):
    """With one record a batch there is nothing else in it."""
    data = records(6)
    damage_image(data[0])
    take_answer(data[2])
    _, logs, found = trained(tmp_path, data, 1, max_steps=4, dataloader_num_workers=workers)
    assert [(one["id"], one["step"]) for one in found] == [("r0", 1), ("r2", 3)]
    assert all(one["replaced_by"] in {"r1", "r3", "r4", "r5"} for one in found)
    assert all(entry["label_tokens"] > 0 for entry in logs)


class Fails(TorchDataset):
    """A data set that fails by itself, as one that decodes its images does."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == 1:
            raise OSError("the file ends too early")
        return self.rows[index]


def decoding(rows):
    """`datasets` decode the images, and fail on one of them."""
    damage_image(rows[1])
    images = [row.pop("images")[0] for row in rows]
    rows = [{**row, "image": image} for row, image in zip(rows, images, strict=True)]
    return Dataset.from_list(rows).cast_column("image", Image())


def transformed(rows):
    def spoiled(batch):
        assert "r1" not in batch["id"], "a transform that fails"
        return batch

    data = Dataset.from_list(rows)
    data.set_transform(spoiled)
    return data


@pytest.mark.parametrize("make", [Fails, decoding, transformed])
def test_a_data_set_that_fails_by_itself(tmp_path, make):
    with pytest.raises((OSError, AssertionError)):
        trained(tmp_path / "error", make(records(8)), on_bad="error")
    _, logs, found = trained(tmp_path / "skip", make(records(8)))
    assert [(one["id"], one["step"]) for one in found] == [("sample 1", 1)]
    assert len(logs) == 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_stream(tmp_path, batch_size):
    """Its replacements stand in the same batch; where there is none, the row has nothing to learn."""
    data = records(12)
    damage_image(data[1])
    rows = [{name: row[name] for name in ("id", "messages", "images")} for row in data]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    _, logs, found = trained(tmp_path, stream, batch_size, max_steps=3)
    assert [(one["id"], one["step"]) for one in found] == [("r1", 2 if batch_size == 1 else 1)]
    assert found[0]["replaced_by"] in (("(nothing)",) if batch_size == 1 else ("r0", "r2", "r3"))
    labels = [entry["label_tokens"] for entry in logs]
    assert (labels[1] == 0) == (batch_size == 1)


def test_prompts_and_completions(tmp_path):
    """TRL's collator, which names no record."""
    rows = [{"id": row["id"], "images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:]}
            for row in tiny_dataset(8)]  # fmt: skip
    rows[1] |= {"images": ["no image"]}
    rows[2] |= {"completion": [{"role": "assistant", "content": ""}]}
    _, logs, found = trained(tmp_path, rows)
    assert {one["id"] for one in found} >= {"r1"}
    assert len(logs) == 2


def test_evaluation_counts_nothing_in_its_place(tmp_path):
    data, held_out = records(8), records(6)
    expected = trainer(tmp_path / "clean", data, eval_dataset=held_out[:1] + held_out[2:]).evaluate()
    damage_image(held_out[1])
    this = trainer(tmp_path / "skip", data, eval_dataset=held_out, per_device_eval_batch_size=2)
    for _ in range(2):
        got = this.evaluate()
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    found = read_quarantine(tmp_path / "skip" / "quarantine.jsonl")
    assert [(one["id"], one["where"]) for one in found] == [("r1", "evaluation")], "once, however often it is met"


@pytest.mark.parametrize("most", [2, 0.02, 0, None])
def test_too_many_end_it_with_the_list(tmp_path, most):
    """A share is told from a hundred records on."""
    data = records(120)
    for number in (1, 30, 90):
        damage_image(data[number])
    changes = {"max_steps": 30, "max_bad_records": most}
    if most is None:
        assert len(trained(tmp_path, data, **changes)[2]) == 3
        return
    allows = {2: "3 of 92 records", 0.02: "4 of 108 records", 0: "1 of 4 records"}[most]
    if most == 0.02:
        for number in (104, 108):
            damage_image(data[number])
    with pytest.raises(
        ValueError, match=rf"{allows}.*max_bad_records={most:g} allows. The first: .*'r1'.*quarantine.jsonl"
    ):
        trained(tmp_path, data, **changes)
    assert len(read_quarantine(tmp_path / "quarantine.jsonl")) == int(allows[0])


def test_what_fails_on_all_records_is_no_bad_record(tmp_path):
    data = records(40)
    for row in data:
        lose_image(row)
    with pytest.raises(ValueError, match=r"no such file.* And of 16 others that were tried in its place not one"):
        trained(tmp_path, data)


def test_too_long_is_an_error_where_that_was_asked_for(tmp_path):
    with pytest.raises(ValueError, match="tokens, image tokens included, are more than max_length=8"):
        trained(tmp_path, records(8), max_length=8, on_long="error")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_has_the_same_losses_and_the_same_list(tmp_path, workers):
    data = records(40)
    for number in (2, 9, 13, 21):
        damage_image(data[number])
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": workers}
    changes["train_sampling_strategy"] = "random"
    weights, logs, found = trained(tmp_path / "whole", data, **changes)
    assert len(found) >= 3
    trained(tmp_path / "parts", data, **changes)
    cut = tmp_path / "parts"
    for step in (4, 6):
        for path in sorted((cut / f"checkpoint-{step}").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (cut / f"checkpoint-{step}").rmdir()
    with (cut / "quarantine.jsonl").open("a") as file:
        file.write('{"id": "half a li')  # what a kill leaves
    this = trainer(cut, data, **changes)
    this.train(resume_from_checkpoint=True)
    again = read_quarantine(cut / "quarantine.jsonl")
    assert again == found
    assert equal(this.model.state_dict(), weights)
    later = [entry["loss"] for entry in this.state.log_history if "loss" in entry]
    assert later == [entry["loss"] for entry in logs]


RANK = """
import sys
import torch
from datasets import IterableDataset
from seecal.ops.distributed import leave
from tests.trainer.test_quarantine import damage_image, records, take_answer, trained
from pathlib import Path

folder = Path(sys.argv[1])
torch.set_num_threads(1)
data = records(24)
damage_image(data[5])
take_answer(data[12])
weights, logs, _ = trained(folder / "set", data, 2, max_steps=4)
rows = [{name: row[name] for name in ("id", "messages", "images")} for row in data]
trained(folder / "stream", IterableDataset.from_generator(lambda: iter(rows)), 2, max_steps=4)
if torch.distributed.get_rank() == 0:
    torch.save({"weights": weights, "losses": [entry["loss"] for entry in logs]}, folder / "two.pt")
torch.distributed.barrier()
leave(0)
"""


def test_two_ranks_are_one(tmp_path):
    """One rank's record is put aside while the other's are good."""
    (tmp_path / "rank.py").write_text(RANK)
    two_ranks(tmp_path / "rank.py", tmp_path)
    data = records(24)
    damage_image(data[5])
    take_answer(data[12])
    weights, logs, found = trained(tmp_path / "one", data, 4, max_steps=4)
    two = torch.load(tmp_path / "two.pt")
    met = read_quarantine(tmp_path / "set" / "quarantine.jsonl")
    told = [(one["id"], one["step"], one["replaced_by"]) for one in found]
    assert sorted((one["id"], one["step"], one["replaced_by"]) for one in met) == sorted(told)
    assert len(met) == 2
    assert torch.tensor(two["losses"]) == pytest.approx(torch.tensor([entry["loss"] for entry in logs]), abs=1e-5)
    assert max(float((two["weights"][name] - value).abs().max()) for name, value in weights.items()) <= 1e-5
    assert {one["id"] for one in read_quarantine(tmp_path / "stream" / "quarantine.jsonl")} == {"r5", "r12"}


def test_lines_of_several_writers_and_of_a_kill(tmp_path):
    file = QuarantineFile(tmp_path / "q.jsonl", stage=2)
    file.add([{"id": "a\u2028b\ud800", "reason": "one", "where": "training", "step": 3}])
    with file.path.open("a") as half:
        half.write('{"id": "c"')
    assert [one["id"] for one in file.read()] == ["a\u2028b?"]
    file.add([{"id": "d", "reason": "two", "where": "training", "step": 5}])
    QuarantineFile(file.path, stage=1).add([{"id": "e", "reason": "three", "where": "training", "step": 9}])
    assert [one["id"] for one in file.read()] == ["a\u2028b?", "d", "e"]
    file.begin(3)
    assert [one["id"] for one in file.read()] == ["a\u2028b?", "e"], "what another stage met stays"
    file.rewind()
    assert [one["id"] for one in file.follow()] == ["a\u2028b?", "e"]
    QuarantineFile(file.path, stage=1).add([{"id": "f", "reason": "four"}])
    with file.path.open("a") as half:
        half.write('{"id": "g", "rea')
    assert [one["id"] for one in file.follow()] == ["f"], "what is new, and whole"
    with file.path.open("a") as rest:
        rest.write('son": "five"}\n')
    assert [one["id"] for one in file.follow()] == ["g"]
    assert file.follow() == []
    file.path.write_text("[1]\n" + json.dumps({"id": "x", "reason": "y"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 is no record of a quarantine"):
        file.read()
