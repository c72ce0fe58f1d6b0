"""Which collator a training gets: told by what a sample is, not by an image column beside it."""

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from seecal import CALConfig, CALTrainer, VisionCollator
from seecal.data.collators.checked import CheckedCollator
from seecal.trainer.collators import PromptCollator, TextCollator, collator_for, without_contrast
from seecal.trainer.samples import Kind, first_sample, kind_of
from tests.support.tiny import tiny_dataset, tiny_image, tiny_llava, tiny_llava_processor, tiny_records, tiny_tokenizer


def config(folder, **changes):
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return CALConfig(
        str(folder), max_steps=1, logging_steps=1, per_device_train_batch_size=2,
        train_sampling_strategy="sequential", gradient_checkpointing=False, **settings, **changes
    )  # fmt: skip


class Seen(CALTrainer):
    """Keeps the first batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batch = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return super().training_step(model, inputs, num_items_in_batch)


def text_only():
    rows = [{"id": row["id"], "messages": row["messages"]} for row in tiny_records(4)]
    return Dataset.from_list(rows)


def own_images():
    """The parts bring their images, as chats for apply_chat_template are written; there is no column of images."""
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    features = Features({"id": Value("string"), "messages": List({"role": Value("string"), "content": List(part)})})
    rows = []
    for row in tiny_records(4):
        (question, answer) = row["messages"]
        parts = [{"type": "image", "image": image} for image in row["images"]]
        parts.append({"type": "text", "text": question["content"]})
        reply = [{"type": "text", "text": answer["content"]}]
        chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": reply}]
        rows.append({"id": row["id"], "messages": chat})
    return Dataset.from_list(rows, features=features)


def made_by_a_transform():
    """The columns are a question, an answer and an image; the samples are conversations."""
    rows = tiny_records(4)
    columns = {
        "question": [row["messages"][0]["content"] for row in rows],
        "answer": [row["messages"][1]["content"] for row in rows],
        "colour": [row["images"][0].getpixel((0, 0)) for row in rows],
    }

    def transform(batch):
        chats = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in zip(batch["question"], batch["answer"], strict=True)
        ]
        images = [[tiny_image("red").copy()] for _ in chats]
        for (image,), colour in zip(images, batch["colour"], strict=True):
            image.paste(tuple(colour), (0, 0, *image.size))
        return {"messages": chats, "images": images}

    return Dataset.from_dict(columns).with_transform(transform)


class Records(torch.utils.data.Dataset):
    """A data set of torch's, which is asked for its samples by number."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return tiny_records(4)[index]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tiny_records(4))


def as_llava():
    """``conversations`` of LLaVA's format, whose text says where the image stands."""
    rows = []
    for row in tiny_records(4):
        turns = [
            {"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in row["messages"]
        ]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append({"id": row["id"], "conversations": turns, "image": row["images"][0]})
    return rows


DATA = {
    "a column of images": lambda: tiny_dataset(4),
    "one image each": lambda: tiny_dataset(4).map(lambda row: {"image": row["images"][0]}, remove_columns="images"),
    "a list": lambda: tiny_records(4),
    "a list without images": lambda: list(text_only()),
    "a data set of torch": Records,
    "a stream of torch": Stream,
    "no image at all": text_only,
    "images inside the parts": own_images,
    "made by a transform": made_by_a_transform,
    "a stream": lambda: tiny_dataset(4).to_iterable_dataset(),
    "a stream without images": lambda: text_only().to_iterable_dataset(),
}


@pytest.mark.parametrize("name", DATA)
def test_conversations_are_ours_wherever_their_images_are(tmp_path, name):
    data = DATA[name]()
    assert kind_of(first_sample(data, "data")) is Kind.CONVERSATIONS
    this = Seen(
        tiny_llava(),
        config(tmp_path),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_llava_processor(),
    )
    assert isinstance(this.data_collator, VisionCollator)
    this.train()
    rows = tiny_records(2) if "no image" not in name and "without images" not in name else list(text_only())[:2]
    assert this.train_dataset is data
    expected = VisionCollator(tiny_llava_processor())(rows)
    assert this.batch.pop("long_records").tolist() == [0, 0]
    assert this.batch.keys() == {*expected}
    for key in expected:
        assert torch.equal(this.batch[key], expected[key]), key
    every = VisionCollator(tiny_llava_processor())(tiny_records(4))
    assert this.evaluate()["eval_label_tokens"] == int((every["labels"] != -100).sum())


def test_rows_of_other_formats_are_conversations_too(tmp_path):
    captions = [{"image": row["images"][0], "caption": row["messages"][1]["content"]} for row in tiny_records(4)]
    for data in (as_llava(), captions):
        this = Seen(tiny_llava(), config(tmp_path), train_dataset=data, processing_class=tiny_llava_processor())
        this.train()
        expected = VisionCollator(tiny_llava_processor())(data[:2])
        assert torch.equal(this.batch["labels"], expected["labels"])
        assert int((expected["labels"] != -100).sum()) > 10


def test_settings_of_the_processor_are_set_before_training_and_saved(tmp_path):
    chats = tiny_dataset(4)
    prompts = chats.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns="messages"
    )
    size = {"height": 16, "width": 16}
    for data in (chats, prompts):
        args = config(tmp_path, processor_kwargs={"size": size, "do_center_crop": False})
        this = CALTrainer(tiny_llava(), args, train_dataset=data, processing_class=tiny_llava_processor())
        assert this.processing_class.image_processor.size == size
        this.save_model()
        assert AutoProcessor.from_pretrained(tmp_path).image_processor.size == size
    wrong = config(tmp_path, processor_kwargs={"max_pixel": 3})
    with pytest.raises(ValueError, match="LlavaProcessor has no setting 'max_pixel'"):
        CALTrainer(tiny_llava(), wrong, train_dataset=prompts, processing_class=tiny_llava_processor())
    given = VisionCollator(tiny_llava_processor())
    with pytest.raises(ValueError, match=r"processor_kwargs=.* with data_collator.*VisionCollator.*processor_kwargs="):
        CALTrainer(tiny_llava(), args, given, chats, processing_class=tiny_llava_processor())


def test_one_that_is_given_stays(tmp_path):
    for data in (tiny_dataset(2), text_only()):
        given = VisionCollator(tiny_llava_processor(), contrast="noise", strength=1.0)
        this = Seen(tiny_llava(), config(tmp_path), given, data, processing_class=tiny_llava_processor())
        assert this.data_collator is given
        this.train()
        expected = VisionCollator(tiny_llava_processor())([data[0], data[1]])
        assert torch.equal(this.batch["labels"], expected["labels"]), "it gets the records, not TRL's token ids of them"


SETTINGS = {
    "train_on": ("last", "train_on='last'"),
    "max_length": (200, "max_length=200"),
    "image_decoding": ("reduced", "decoding='reduced'"),
    "on_long": ("drop", "on_long='drop'"),
    "pad_to_multiple_of": (8, "pad_to_multiple_of=8"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_a_given_collator_does_not_read(tmp_path, caplog, name):
    """It would train on other tokens, or pixels, than were asked for."""
    value, there = SETTINGS[name]
    args, processor = config(tmp_path, **{name: value}), tiny_llava_processor()
    with pytest.raises(ValueError, match=rf"{name}={value!r} with data_collator.*VisionCollator\(processor, {there}\)"):
        CALTrainer(tiny_llava(), args, VisionCollator(processor), tiny_dataset(2), processing_class=processor)
    same = VisionCollator(processor, **{there.split("=")[0]: value})
    CALTrainer(tiny_llava(), args, same, tiny_dataset(2), processing_class=processor)
    assert "not read" not in caplog.text
    own = lambda records: same(records)  # noqa: E731
    CALTrainer(tiny_llava(), args, own, tiny_dataset(2), processing_class=processor)
    assert f"{name}={value!r}: not read, since data_collator makes the batches (function)" in caplog.text


UNREAD = [
    ("prompts", "train_on", "last", True),
    ("prompts", "image_decoding", "reduced", True),
    ("prompts", "on_long", "drop", False),
    ("text", "train_on", "last", True),
    ("text", "on_long", "drop", True),
    ("text", "max_length", 200, False),
]


@pytest.mark.parametrize(("data", "name", "value", "said"), UNREAD)
def test_a_setting_that_is_not_for_such_data_is_said(tmp_path, caplog, data, name, value, said):
    rows = [{"prompt": "<image> a photo" if data == "prompts" else "a photo", "completion": " a photo"}] * 2
    if data == "prompts":
        rows = [{**row, "images": [tiny_image("red")]} for row in rows]
    args = config(tmp_path, **{name: value})
    CALTrainer(tiny_llava(), args, train_dataset=rows, processing_class=tiny_llava_processor())
    assert (f"{name}={value!r}: not read for data without messages" in caplog.text) == said


def test_a_contrast_on_pixels_reaches_the_collator_and_not_the_evaluation(tmp_path):
    made = {
        (contrast, weighting): collator_for(
            config(tmp_path, contrast=contrast, weighting=weighting, pad_to_multiple_of=8, on_bad="skip", max_length=77),
            tiny_llava_processor(), None, set(), Kind.CONVERSATIONS,
        )
        for contrast, weighting in (("noise", "cal"), ("drop", "cal"), ("noise", "uniform"))
    }  # fmt: skip
    assert [one.contrast for one in made.values()] == ["noise", None, None]
    for one in made.values():
        assert (one.max_length, one.pad_to_multiple_of, one.on_long, one.on_bad) == (77, 8, "truncate", "skip")
    noisy, plain, _ = made.values()
    assert noisy.strength == 0.5
    assert without_contrast(plain) is plain
    quiet = without_contrast(noisy)
    assert (quiet.contrast, quiet.max_length, quiet.with_ids, quiet.on_bad) == (None, 77, True, "skip")
    noisy.counts.said_cut = 1
    assert quiet.counts.said_cut, "what was said in training is not said again"


def test_trls_own_collators(tmp_path):
    processor = tiny_llava_processor()
    args = config(tmp_path, max_length=50, on_long="drop", on_bad="skip")
    trl = DataCollatorForVisionLanguageModeling(processor, max_length=50)
    made = collator_for(args, processor, trl, {3}, Kind.PROMPTS)
    assert isinstance(made, CheckedCollator)
    assert isinstance(made.collator, PromptCollator)
    assert made.collator.max_length is None, "it would cut, perhaps inside an image"
    assert (made.max_length, made.on_long, made.on_bad, made.image_ids) == (50, "drop", "skip", {3})
    text = DataCollatorForLanguageModeling(pad_token_id=3, pad_to_multiple_of=8)
    made = collator_for(args, processor, text, {3}, Kind.TEXT)
    assert isinstance(made, TextCollator)
    batch = made([{"input_ids": [5, 6], "labels": [-100, 6]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        name: value.tolist() for name, value in text([{"input_ids": [5, 6], "labels": [-100, 6]}]).items()
    }, "padding of the same id is no image"
    with pytest.raises(ValueError, match=r"position 1 of row 0 of a batch, id 3, stands for an image.*'images'"):
        made([{"input_ids": [5, 3], "labels": [-100, 3]}])


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"processing_class is a .*Tokenizer.*: conversations .*AutoProcessor"):
        CALTrainer(tiny_llava(), config(tmp_path), train_dataset=text_only(), processing_class=tiny_tokenizer())
    chats = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in own_images()]
    with pytest.raises(ValueError, match="train_dataset has an image inside its 'prompt' and no column 'images'"):
        first_sample(Dataset.from_list(chats, features=Features({
            key: own_images().features["messages"] for key in ("prompt", "completion")
        })), "train_dataset")  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": tiny_dataset(1), "test": tiny_dataset(1)}, r"is a dict of train, test: pass one.*data\['train'\]"),
        ("data.json", r"is a str: .*seecal\.load_records"),
        (3, "is a int: expected"),
        ([], "train_dataset is empty"),
        (tiny_dataset(1).select([]), "train_dataset is empty"),
        ([["a", "b"]], "gives a list: each sample must be a dict"),
        ([{**tiny_records(1)[0], "weights": 0.5}], "'weights' whose first value is 0.5: expected a list"),
        ([{**tiny_records(1)[0], "weights": ["a"]}], r"'weights' whose first value is \['a'\]: expected a list"),
        (tiny_dataset(2).add_column("weights", [1.0, 2.0]), "'weights' whose first value is 1.0.*rename or remove"),
        ([{**tiny_records(1)[0], "videos": ["clip.mp4"]}], "train_dataset has 'videos': only images are read"),
        ([{**tiny_records(1)[0], "audio": "a.wav"}], "train_dataset has 'audio': only images are read"),
        ([{**tiny_records(1)[0], "tools": [{}]}], "train_dataset has 'tools': chat templates are not given them"),
        ([{"messages": tiny_records(1)[0]["messages"], "image_path": "a.png"}], "an image under 'image_path' and none"),
        ([{"prompt": "a", "completion": "b", "picture": tiny_image("red")}], r"rename_column\('picture', 'image'\)"),
    ],
    ids=[
        *("splits", "path", "number", "empty", "no rows", "lists", "a weight", "words", "a column"),
        *("videos", "audio", "tools", "an image path", "an image"),
    ],
)
def test_data_that_cannot_be_read_is_told_at_construction(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        CALTrainer(tiny_llava(), config(tmp_path), train_dataset=data, processing_class=tiny_llava_processor())


def test_weights_as_lists_or_arrays_are_fine():
    for weights in (None, [1.0, 2], (1, 2), torch.ones(2)):
        assert first_sample([{"messages": [], "weights": weights}], "data")["messages"] == []


def test_conversations_are_not_left_to_trls_text_collator(tmp_path):
    given = DataCollatorForLanguageModeling(pad_token_id=0)
    with pytest.raises(
        ValueError, match=r"DataCollatorForLanguageModeling and the data set has messages.*the user's too"
    ):
        CALTrainer(tiny_llava(), config(tmp_path), given, text_only(), processing_class=tiny_llava_processor())


def test_what_is_not_ours():
    chats = tiny_dataset(2).map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns="messages"
    )
    kinds = {
        Kind.TEXT: [{"prompt": "a", "completion": "b"}, {"text": "a"}],
        Kind.TOKENS: [{"messages": [], "input_ids": [1]}],  # tokenised already
        Kind.PROMPTS: [chats[0], {"prompt": "a", "completion": "b", "image": None}],
        Kind.CONVERSATIONS: [{"conversations": []}, {"messages": [], "images": [], "input_ids": [1]}],
    }
    assert all(kind_of(sample) is kind for kind, samples in kinds.items() for sample in samples)


def test_what_nobody_reads_is_said_once(tmp_path, caplog):
    data = [{**row, "image_path": "a.png", "score": 1} for row in tiny_records(4)]
    CALTrainer(tiny_llava(), config(tmp_path), train_dataset=data, processing_class=tiny_llava_processor()).train()
    assert caplog.text.count("not read of the samples of train_dataset: image_path, score") == 1


def test_a_formatting_function_is_said_to_have_no_use(tmp_path, caplog):
    CALTrainer(
        tiny_llava(),
        config(tmp_path),
        train_dataset=tiny_dataset(2),
        processing_class=tiny_llava_processor(),
        formatting_func=str,
    )
    assert "formatting_func is not used: the chat template" in caplog.text
