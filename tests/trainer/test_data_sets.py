"""Evaluation data of another form than the training's, several sets of it, text that TRL tokenises, order by length."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from seecal import CALTrainer, VisionCollator
from seecal.data.sources.quarantine_file import read_quarantine
from seecal.trainer.sampling import GroupedByEpoch, estimated_tokens, only_lengths
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records

PROMPT, COMPLETION = "What colour is it?", " It is red."


def trainer(folder, data, **changes):
    arguments = {name: changes.pop(name) for name in ("eval_dataset", "data_collator") if name in changes}
    settings = {"max_steps": 1, "per_device_eval_batch_size": 2, "gradient_checkpointing": False, **changes}
    args = sgd_config(folder, settings.pop("batch_size", 2), 1, **settings)
    return CALTrainer(tiny_llava(), args, train_dataset=data, processing_class=tiny_llava_processor(), **arguments)


def prompts(n):
    rows = tiny_dataset(n)
    return rows.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns="messages"
    )


def texts(n):
    return Dataset.from_list([{"prompt": PROMPT, "completion": COMPLETION}] * n)


def chats(n):
    """Text only."""
    return [
        {
            "id": str(row),
            "messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COMPLETION}],
        }
        for row in range(n)
    ]


def label_count(collator, records):
    return int((collator(records)["labels"] != -100).sum())


def text_ids():
    """(ids of prompt and completion together, how many of them the completion has)."""
    tokenizer = tiny_llava_processor().tokenizer
    prompt, whole = (tokenizer(text)["input_ids"] for text in (PROMPT, PROMPT + COMPLETION + tokenizer.eos_token))
    assert whole[: len(prompt)] == prompt
    return whole, len(whole) - len(prompt)


def text_label_count(n):
    return n * text_ids()[1]


FORMS = {"messages": tiny_dataset, "text-only messages": chats, "prompts": prompts, "texts": texts}


@pytest.mark.parametrize("training", FORMS)
def test_each_evaluation_set_is_told_by_its_own_samples(tmp_path, training):
    """Labels of an evaluation are the same tokens whatever the training's records look like."""
    sets = {name.replace(" ", "_"): form(3) for name, form in FORMS.items()}
    this = trainer(tmp_path, FORMS[training](4), eval_dataset=sets, eval_strategy="steps", eval_steps=1)
    this.train()
    found = {}
    for entry in this.state.log_history:
        found |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    counts = {name: found[f"eval_{name}_label_tokens"] for name in sets}
    ours = VisionCollator(tiny_llava_processor())
    assert counts["messages"] == label_count(ours, tiny_records(3))
    assert counts["text-only_messages"] == label_count(ours, chats(3))
    assert counts["texts"] == text_label_count(3)
    assert counts["prompts"] == counts["messages"] + 3, "TRL's completions end with what the template writes after them"
    for name in sets:
        assert f"eval_{name}_loss" in found
    assert {"eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"} <= found.keys(), "TRL's names"
    fresh = this.evaluate(chats(3))
    assert fresh["eval_label_tokens"] == label_count(ours, chats(3))
    assert this.evaluate(texts(3))["eval_label_tokens"] == text_label_count(3)


def test_a_data_set_that_was_seen_in_training_only_is_evaluated_as_it_would_be_trained(tmp_path):
    """The loss of one evaluation set among others is that of the set alone."""
    alone = trainer(tmp_path, tiny_dataset(4), eval_dataset=texts(3)).evaluate()["eval_loss"]
    this = trainer(tmp_path, tiny_dataset(4), eval_dataset={"a": tiny_dataset(2), "b": texts(3)})
    assert this.evaluate()["eval_b_loss"] == pytest.approx(alone)
    model = tiny_llava().eval()
    whole, count = text_ids()
    ids = torch.tensor([whole])
    labels = ids.clone()
    labels[:, :-count] = -100
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    expected = cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
    assert alone == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("form", ["text", "prompt", "tokens"])
def test_text_that_holds_an_image_token_stops(tmp_path, form):
    """TRL's text path gives no pixels: the placeholder would be a label, or a word that means nothing."""
    ids = tiny_llava_processor().tokenizer("<image> red")["input_ids"]
    rows = {
        "text": {"text": "<image> red"},
        "prompt": {"prompt": "<image> what?", "completion": "red"},
        "tokens": {"input_ids": ids, "labels": ids},
    }
    # The processor of LLaVA looks for itself while TRL tokenises
    message = "stands for an image, and no image goes with text|<image> tokens in the text but no images"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [rows[form]] * 4).train()


def test_prompts_of_text_are_not_labels_and_token_ids_without_labels_are_said(tmp_path, caplog):
    for data in (texts(4), list(texts(4)), texts(4).to_iterable_dataset()):
        this = trainer(tmp_path, data)
        this.train()
        assert this.state.log_history[0]["label_tokens"] == text_label_count(2)
    assert "no labels: every token is one" not in caplog.text
    this = trainer(tmp_path, [{"input_ids": [5, 6, 7]}] * 4)
    this.train()
    assert this.state.log_history[0]["label_tokens"] == 2 * 2
    assert caplog.text.count("the train data set has input_ids and no labels: every token is one") == 1


def test_a_record_that_a_processor_fails_on_is_named(tmp_path):
    """Among prompts and completions, where TRL's collator names none."""
    data = [dict(row) for row in prompts(4)]
    data[1]["images"] = ["no image"]
    this = trainer(tmp_path, data)
    with pytest.raises(ValueError, match=r"^record 'r1': LlavaProcessor failed on it: "):
        this.train()
    assert set(data[0]) == {"id", "images", "prompt", "completion"}, "the caller's records stay as they are"
    assert isinstance(data[0]["prompt"][0]["content"], str)


# ---- records without an answer or an id ----


def unanswered(n):
    """Every third record has no answer."""
    rows = tiny_dataset(n)
    return rows.map(lambda row, index: {"messages": row["messages"][: 2 if index % 3 else 1]}, with_indices=True)


def test_records_without_an_answer(tmp_path, caplog):
    changes = {"max_steps": 2, "batch_size": 4}
    with pytest.raises(ValueError, match="record 'r0': no label: it has no assistant message with text"):
        trainer(tmp_path, unanswered(8), **changes).train()
    this = trainer(tmp_path, unanswered(8), **changes, on_bad="skip")
    this.train()
    logs = [entry for entry in this.state.log_history if "loss" in entry]
    assert [entry["records_dropped"] for entry in logs] == [2, 1]
    assert caplog.text.count("put aside in step 1: record 'r0': no label") == 1
    found = read_quarantine(tmp_path / "quarantine.jsonl")
    assert [entry["id"] for entry in found] == ["r0", "r3", "r6"]
    learnt = ["r1", "r2", *(entry["replaced_by"] for entry in found[:2])]
    rows = {row["id"]: row for row in tiny_records(8)}
    expected = VisionCollator(tiny_llava_processor())([rows[name] for name in learnt])
    assert logs[0]["label_tokens"] == int((expected["labels"] != -100).sum())


@pytest.mark.parametrize("form", ["messages", "prompts", "parts"])
def test_a_record_without_an_id_is_called_by_its_first_words(tmp_path, form):
    rows = [dict(row) for row in (prompts(8) if form == "prompts" else unanswered(8))]
    for row in rows:
        del row["id"]
        if form == "prompts":  # nothing is left to learn of the first one
            row["completion"] = row["completion"] if row is not rows[0] else []
        if form == "parts":
            row["messages"] = [
                {
                    **turn,
                    "content": [
                        *[{"type": "image"}] * len(row["images"]) * (number == 0),
                        {"type": "text", "text": turn["content"]},
                    ],
                }
                for number, turn in enumerate(row["messages"])
            ]
    changes = {"max_steps": 2, "batch_size": 4}
    with pytest.raises(ValueError, match=r"record 0 of the batch \(it has no id; it begins 'What colour is it\?"):
        trainer(tmp_path, rows, **changes).train()
    this = trainer(tmp_path, rows, **changes, on_bad="skip")
    if form != "prompts":
        this.train()
        assert [entry["records_dropped"] for entry in this.state.log_history if "loss" in entry] == [2, 1]


# ---- order by length ----


def uneven(n):
    """Answers of 1 to n times eight characters."""
    rows = tiny_records(n)
    for index, row in enumerate(rows):
        row["images"] = row["images"] or rows[0]["images"]
        row["messages"][1]["content"] = "red red " * (index + 1)
    return rows


STORED = ("a list", "a data set", "parts with images", "one image each")


def stored(form, n):
    rows = uneven(n)
    if form == "a data set":
        return Dataset.from_list(rows, features=tiny_dataset(1).features)
    if form == "one image each":
        return [{"id": row["id"], "messages": row["messages"], "image": row["images"][0]} for row in rows]
    if form == "parts with images":
        for row in rows:
            parts = [
                {"type": "image", "image": row["images"][0]},
                {"type": "text", "text": row["messages"][0]["content"]},
            ]
            row["messages"][0] = {"role": "user", "content": parts}
            del row["images"]
    return rows


@pytest.mark.parametrize("form", STORED)
def test_records_are_grouped_by_length_without_decoding_an_image(tmp_path, form):
    data = stored(form, 8)
    lengths = only_lengths(data, "length")["length"][:]
    assert list(lengths) == sorted(lengths)
    assert len(set(lengths)) == 8
    assert min(lengths) > 576, "an image counts"
    this = trainer(tmp_path, data, train_sampling_strategy="group_by_length", num_train_epochs=2, max_steps=-1)
    sampler = this._get_train_sampler()
    assert isinstance(sampler, GroupedByEpoch)
    first, again = list(sampler), list(sampler)
    assert sorted(first) == list(range(8))
    assert first[0] == 7, "the longest first, to find out of memory early"
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert again != first, "the generator goes on within an epoch"
    sampler.set_epoch(0)
    assert list(sampler) == first
    this.train()
    assert this.state.global_step == 8


def test_text_and_precomputed_lengths_are_used(tmp_path):
    assert only_lengths([{"text": "abcd" * 5}, {"prompt": "abcd", "completion": "abcd"}], "length")["length"][:] == [
        5,
        2,
    ]
    assert only_lengths(Dataset.from_list([{"length": 3, "messages": []}]), "length")["length"][:] == [3]
    assert only_lengths(Dataset.from_list([{"input_ids": [1, 2]}]), "length")["length"][:] == [2]
    assert estimated_tokens({"conversations": [{"from": "human", "value": "abcdefgh"}], "image": "a.png"}) == 576 + 2
    transformed = tiny_dataset(2).with_transform(lambda rows: rows)
    with pytest.raises(
        ValueError, match=r"groups by length.*Give it a column 'length'.*train_sampling_strategy='random'"
    ):
        trainer(tmp_path, transformed, train_sampling_strategy="group_by_length").train()


def test_the_column_of_lengths_reaches_the_sampler(tmp_path):
    data = tiny_dataset(8).add_column("tokens", [1, 2, 3, 4, 9, 8, 7, 6])
    changes = {"train_sampling_strategy": "group_by_length", "length_column_name": "tokens", "max_steps": 4}
    this = trainer(tmp_path, data, **changes, eval_dataset=tiny_dataset(3))
    assert next(iter(this.get_train_dataloader().batch_sampler.sampler)) == 4
    this.train()
    ours = VisionCollator(tiny_llava_processor())
    assert this.evaluate()["eval_label_tokens"] == label_count(ours, tiny_records(3))


def test_an_evaluation_makes_no_images_that_nobody_reads(tmp_path):
    """A contrast on pixels costs a second image of each; evaluation has no second pass."""
    this = trainer(tmp_path, tiny_dataset(4), eval_dataset=tiny_dataset(2), contrast="noise")
    (evaluation,) = this.get_eval_dataloader()
    assert "pixel_values" in evaluation
    assert not [name for name in evaluation if name.startswith("contrast_")]
    training = next(iter(this.get_train_dataloader()))
    assert [name for name in training if name.startswith("contrast_")], "and training has them afterwards"


def test_evaluation_data_does_not_change_what_training_learns(tmp_path):
    """Completions of the evaluation's prompts are its labels; of the training's texts all tokens stay labels."""
    text = Dataset.from_list([{"text": PROMPT + COMPLETION}] * 4)
    this = trainer(tmp_path, text, eval_dataset=texts(2))
    assert this.completion_only_loss is False
    assert this.evaluate()["eval_label_tokens"] == text_label_count(2)
    assert this.completion_only_loss is False
    (batch, *_) = this.get_train_dataloader()
    assert (batch["labels"] != -100).sum() > text_label_count(2)
