"""Which collator a training gets: told by what a sample is, not by an image column beside it."""

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from seecal import CALConfig, CALTrainer, VisionCollator
from seecal.data.collators.checked import CheckedCollator
from seecal.trainer.collators import collator_for, has_conversations, without_contrast
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


DATA = {
    "a column of images": lambda: tiny_dataset(4),
    "no image at all": text_only,
    "images inside the parts": own_images,
    "made by a transform": made_by_a_transform,
    "a stream": lambda: tiny_dataset(4).to_iterable_dataset(),
    "a stream without images": lambda: text_only().to_iterable_dataset(),
}


@pytest.mark.parametrize("name", DATA)
def test_conversations_are_ours_wherever_their_images_are(tmp_path, name):
    data = DATA[name]()
    assert has_conversations(data)
    settings = {"remove_unused_columns": False} if "transform" in name else {}
    this = Seen(
        tiny_llava(),
        config(tmp_path, **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_llava_processor(),
    )
    assert isinstance(this.data_collator, VisionCollator)
    this.train()
    rows = tiny_records(2) if "no image" not in name and "without images" not in name else list(text_only())[:2]
    expected = VisionCollator(tiny_llava_processor())(rows)
    assert this.batch.pop("long_records").tolist() == [0, 0]
    assert this.batch.keys() == {*expected}
    for key in expected:
        assert torch.equal(this.batch[key], expected[key]), key
    every = VisionCollator(tiny_llava_processor())(tiny_records(4))
    assert this.evaluate()["eval_label_tokens"] == int((every["labels"] != -100).sum())


def test_one_that_is_given_stays(tmp_path):
    for data in (tiny_dataset(2), text_only()):
        given = VisionCollator(tiny_llava_processor(), contrast="noise", strength=1.0)
        assert not has_conversations(data, given)
        this = CALTrainer(
            tiny_llava(),
            config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}),
            given,
            data,
            processing_class=tiny_llava_processor(),
        )
        assert this.data_collator is given


def test_a_contrast_on_pixels_reaches_the_collator_and_not_the_evaluation(tmp_path):
    made = {
        (contrast, weighting): collator_for(
            config(tmp_path, contrast=contrast, weighting=weighting, pad_to_multiple_of=8, on_bad="skip", max_length=77),
            tiny_llava_processor(), None, set(), True,
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
    made = collator_for(args, processor, trl, {3}, False)
    assert isinstance(made, CheckedCollator)
    assert made.collator.max_length is None, "it would cut, perhaps inside an image"
    assert (made.max_length, made.on_long, made.on_bad, made.image_ids) == (50, "drop", "skip", {3})
    text = DataCollatorForLanguageModeling(pad_token_id=0)
    assert collator_for(args, processor, text, {3}, False) is text


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset is a list: .*seecal\.load_records"):
        CALTrainer(
            tiny_llava(), config(tmp_path), train_dataset=tiny_records(2), processing_class=tiny_llava_processor()
        )
    with pytest.raises(ValueError, match=r"processing_class is a .*Tokenizer.*: conversations .*AutoProcessor"):
        CALTrainer(tiny_llava(), config(tmp_path), train_dataset=text_only(), processing_class=tiny_tokenizer())
    chats = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in own_images()]
    with pytest.raises(ValueError, match="an image inside its 'prompt' and no column 'images'"):
        has_conversations(Dataset.from_list(chats, features=Features({
            key: own_images().features["messages"] for key in ("prompt", "completion")
        })))  # fmt: skip


def test_what_is_not_ours():
    texts = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    assert not has_conversations(texts)
    assert not has_conversations(Dataset.from_list([{"text": "a"}]))
    assert not has_conversations(Dataset.from_list([{"messages": [], "input_ids": [1]}])), "tokenised already"
    assert not has_conversations(None), "TRL says that it is required"
    chats = tiny_dataset(2).map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns="messages"
    )
    assert not has_conversations(chats)


def test_a_formatting_function_is_said_to_have_no_use(caplog):
    assert has_conversations(tiny_dataset(2), formatting_func=str)
    assert "formatting_func is not used" in caplog.text


def test_no_sample_is_read_where_columns_tell():
    read = []

    def rows():
        read.append(1)
        yield from tiny_records(2)

    from datasets import IterableDataset

    assert has_conversations(IterableDataset.from_generator(rows, features=tiny_dataset(1).features))
    assert not read
