"""Whatever way a data set takes into training, its labels are the same tokens: a recipe, CALTrainer with a data set object,
a collator by hand."""

from collections import Counter

import datasets
import pytest
import yaml

from seecal import CALConfig, CALTrainer, VisionCollator, load_records
from seecal.recipes.recipe import Source, read
from seecal.recipes.run import load_data
from tests.support.sources import RICH, SIMPLE, WRITERS, images_in, messages
from tests.support.tiny import tiny_image, tiny_llava, tiny_llava_processor

FORMATS = [
    "llava_json",
    "sharegpt",
    "messages_parts",
    "messages_texts",
    "prompt_completion",
    "captions_jsonl",
    "parquet",
]


def labels_of(batch):
    return [tuple(row[row != -100].tolist()) for row in batch["labels"]]


def by_trainer(folder, data, **options):
    args = CALConfig(
        str(folder), per_device_train_batch_size=2, max_steps=1, report_to="none", use_cpu=True, bf16=False, **options
    )
    trainer = CALTrainer(tiny_llava(), args, train_dataset=data, processing_class=tiny_llava_processor())
    return Counter(label for batch in trainer.get_train_dataloader() for label in labels_of(batch))


def by_recipe(folder, path, **options):
    """As Run does it: the sources of a recipe's stage, loaded and trained on."""
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"model": "m", "output_dir": str(folder / "o"), "data": str(path)})
    )
    stage = read(str(folder / "recipe.yaml")).stages[0]
    collator = VisionCollator(tiny_llava_processor(), **options)
    data = load_data(stage.data, streaming=False, on_bad="error", seed=0, collator=collator)
    return by_trainer(folder / "out", data, **options)


def by_hand(rows, **options):
    return Counter(labels_of(VisionCollator(tiny_llava_processor(), **options)(list(rows))))


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(tmp_path, name, train_on):
    content = SIMPLE if name in ("prompt_completion", "captions_jsonl") else RICH
    path = WRITERS[name](images_in(tmp_path), content)
    tokenizer = tiny_llava_processor().tokenizer
    answers = [turns[-1:] if train_on == "last" else turns for _, turns in content]
    expected = Counter(
        tuple(index for _, answer in turns for index in tokenizer(f"{answer}<|end|>")["input_ids"]) for turns in answers
    )
    options = {"train_on": train_on}
    assert by_recipe(tmp_path, path, **options) == expected
    assert by_trainer(tmp_path / "a", load_records(path), **options) == expected
    assert by_hand(load_records(path), **options) == expected


CALL = [{"type": "function", "function": {"name": "look", "arguments": {}}}]


def conversations(format):
    """The same conversations as rows of a format, with turns that are not learnt and images in the texts."""
    chats = [
        ([("<image>What?", "It is bad.", {"loss": False}), ("What is it?", "It is red.", {})], [tiny_image("red")]),
        ([("What is it?", "It is. It is.", {"weight": 1})], []),
    ]
    rows = []
    for index, (turns, images) in enumerate(chats):
        chat = []
        for question, answer, keys in turns:
            if format == "messages":
                chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **keys}]
            else:
                chat += [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **keys}]
        rows.append({"id": str(index), format: chat, "images": images})
    return rows


@pytest.mark.parametrize("format", ["messages", "conversations"])
def test_rows_in_memory(tmp_path, format):
    rows = conversations(format)
    tokenizer = tiny_llava_processor().tokenizer
    expected = Counter(tuple(tokenizer(f"{words}<|end|>")["input_ids"]) for words in ("It is red.", "It is. It is."))
    assert by_hand(rows) == by_hand(load_records(rows)) == expected
    assert by_trainer(tmp_path / "a", load_records(rows)) == expected
    if format == "messages":
        assert by_trainer(tmp_path / "b", datasets.Dataset.from_list(rows, on_mixed_types="use_json")) == expected


def test_what_is_refused_is_refused_on_each(tmp_path):
    rows = [{"id": "a7", "messages": messages([("<video>\nWhat?", "b")], str), "images": [tiny_image("red")]}]
    for way in (by_hand, load_records, lambda data: by_trainer(tmp_path, datasets.Dataset.from_list(data))):
        with pytest.raises(ValueError, match=r"a7.*<video>"):
            way(rows)


# ---- A recipe's sources ----


def recipe(tmp_path, data):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": "m", "output_dir": "o", "data": data}))
    return read(str(tmp_path / "r.yaml")).stages[0].data


def test_a_source_says_all_that_load_records_takes(tmp_path):
    asked = {"path": "p", "split": "train", "image_root": ["a", "b"], "columns": {"picture": "image", "mask": None},
             "follow_links": True, "format": "llava"}  # fmt: skip
    (source,) = recipe(tmp_path, asked)
    assert source == Source(**asked)
    assert source.options() == {name: value for name, value in asked.items() if name != "path"}
    assert hash(source) == hash(Source("p", format="llava", split="train", follow_links=True)), "it is a key of a dict"
    assert recipe(tmp_path, "p")[0].options() == dict.fromkeys(source.options()) | {"follow_links": False}
    (source,) = recipe(tmp_path, {"path": "p", "image_root": "a"})
    assert source.image_root == "a"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"splits": "train"}, "data.splits: no such key. Did you mean split"),
        ({"columns": ["a"]}, "data.columns: expected a mapping or null, got"),
        ({"columns": {"a": 3}}, "data.columns.a: expected"),
        ({"follow_links": "perhaps"}, "data.follow_links: expected true or false"),
        ({"image_root": 3}, "data.image_root: expected"),
    ],
)
def test_what_a_source_does_not_take(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, {"path": "p", **wrong})


def test_they_reach_the_data(tmp_path):
    images_in(tmp_path / "one")
    images_in(tmp_path / "two")
    (tmp_path / "two" / "red.png").unlink()
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f"picture,text,mask\nred.png,{split},blue.png\n")
    wanted = {"path": str(tmp_path), "split": "train", "columns": {"picture": "file_name", "mask": None},
              "image_root": [str(tmp_path / "two"), str(tmp_path / "one")]}  # fmt: skip
    data = load_data(recipe(tmp_path, wanted), streaming=False, on_bad="error", seed=0)
    assert data[0]["images"][0]["path"] == str(tmp_path / "one" / "red.png")
    assert data[0]["messages"][1]["content"][0]["text"] == "train"


@pytest.mark.parametrize("key", ["train_on", "processor_kwargs"])
def test_the_settings_of_a_stage(tmp_path, key):
    value = {"train_on": "last", "processor_kwargs": {"size": {"height": 16, "width": 16}}}[key]
    settings = {
        "model": "m",
        "output_dir": str(tmp_path / "o"),
        "data": "p",
        "use_cpu": True,
        "bf16": False,
        key: value,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    stage = read(str(tmp_path / "r.yaml")).stages[0]
    assert getattr(stage.config(tmp_path), key) == value
