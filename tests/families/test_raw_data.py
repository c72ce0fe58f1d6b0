"""From Pillow images and messages to a training step, through each family's own processor: labels, Δ, what has moved."""

import functools

import pytest
import torch
from peft import LoraConfig
from transformers import set_seed

from seecal import CALConfig, CALTrainer
from seecal.data.collators.vision import VisionCollator
from seecal.families.table import decoder_of
from tests.support import processors
from tests.support.raw_data import assistant, dataset, layers_of, model_of, processor_of, records, text, turns_of, user

FAMILIES = [
    "llava", "llava_next", "mgm", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3",
    "smolvlm", "paligemma", "gemma3", "mistral3", "glm4v", "ovis2", "mllama",
]  # fmt: skip
MODES = ["plain", "checkpointing", "LoRA"]
# What ends the assistant's turns: (a turn that another follows, the last one)
ENDS = {
    **dict.fromkeys(FAMILIES, ("<|im_end|>", "<|im_end|>")),
    **dict.fromkeys(["llava", "llava_next", "mgm", "mistral3"], ("</s>", "</s>")),
    **dict.fromkeys(["idefics3", "smolvlm"], ("<end_of_utterance>", "<end_of_utterance>")),
    "paligemma": ("<eos>", "<eos>"),
    "gemma3": ("<end_of_turn>", "<end_of_turn>"),
    "glm4v": ("<|user|>", ""),  # the next turn's opening stops it; the template writes nothing after the last
    "mllama": ("<|eot_id|>", "<|eot_id|>"),
}
SPACED = {
    "llava",
    "mgm",
    "idefics3",
    "smolvlm",
}  # the template writes a space before an answer, and the two are one token


EVERY = list(FAMILIES)


def answers(messages):
    return [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]


def labelled(family, messages):
    """The text of a row's labels: each answer and what ends it."""
    said = [(" " if family in SPACED else "") + one for one in answers(messages)]
    between, last = ENDS[family]
    return between.join(said) + last


class Recorded(CALTrainer):
    """Keeps what the step was made of."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.cal = outputs.cal
        return (loss, outputs) if return_outputs else loss


def is_vision(name):
    return "vision" in name or "visual" in name


@functools.cache
def trained(family, mode):
    """(trainer after one step, {name: whether the parameter moved}) on the mixed batch."""
    set_seed(0)
    model = model_of(family)
    lora = LoraConfig(r=2, target_modules=layers_of(model)) if mode == "LoRA" else None
    args = CALConfig(
        "unused",
        per_device_train_batch_size=3,
        max_steps=1,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=None,
        train_sampling_strategy="sequential",
        gradient_checkpointing=mode != "plain",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    if mode == "plain":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_vision(name))
    trainer = Recorded(
        model, args, train_dataset=dataset(family), processing_class=processor_of(family), peft_config=lora
    )
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: not torch.equal(one, before[name]) for name, one in trainer.model.named_parameters()}
    return trainer, moved


# ---------------------------------------------------------------- labels


def labels_of(collator, rows):
    return [collator.tokenizer.decode(row[row != -100]) for row in collator(rows)["labels"]]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [2, 1, 2], [2]], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_labels_are_the_answers_and_their_ends(family, order):
    """Wherever in the batch the row without an image stands, or if there is no other."""
    rows = [records(family)[index] for index in order]
    collator = VisionCollator(processor_of(family))
    assert labels_of(collator, rows) == [labelled(family, row["messages"]) for row in rows]
    batch = collator(rows)
    assert len(batch["labels"]) == len(batch["attention_mask"]) == len(rows)
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


@pytest.mark.parametrize("family", [name for name in EVERY if name != "paligemma"])
def test_a_template_with_generation_markers_gives_the_same(family):
    processor, rows = processor_of(family), records(family)
    marked = VisionCollator(processor, chat_template=processors.with_markers(processor.chat_template))
    first, second = VisionCollator(processor)(rows), marked(rows)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["labels"], second["labels"])


@pytest.mark.parametrize("family", EVERY)
def test_no_image_is_cut(family):
    """The longest row is cut after its last image, never inside: whatever ids an image is made of."""
    row = records(family)[0]
    batch = VisionCollator(processor_of(family))([row])
    whole, labels = batch["input_ids"][0], batch["labels"][0]
    image_id = getattr(model_of(family).config, "image_token_id", None) or model_of(family).config.image_token_index
    last = int((whole == image_id).nonzero().max())
    with pytest.raises(ValueError, match="an image cannot be cut"):
        VisionCollator(processor_of(family), max_length=last, on_long="truncate")([row])
    shortest = max(last + 1, int((labels != -100).nonzero()[0]) + 1)  # one without a label would be an error
    cut = VisionCollator(processor_of(family), max_length=shortest, on_long="truncate")([row])["input_ids"][0]
    assert cut.tolist() == whole[:shortest].tolist()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [0], [0, 0]], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_a_record_left_out_leaves_the_others_as_they_are(family, order):
    """Wherever it stands in the batch, and whether the template or the tokenizer writes what begins a text."""
    rows = [records(family)[index] for index in order]
    plain = VisionCollator(processor_of(family))
    lengths = [int(plain([row])["attention_mask"].sum()) for row in rows]
    limit = max(lengths) - 1
    batch = VisionCollator(processor_of(family), max_length=limit, on_long="drop")(rows)
    unanswered = [{**row, "messages": row["messages"][:1]} for row in rows]
    for each, row in zip(unanswered, rows, strict=True):
        each["images"] = row["images"][: sum(part["type"] == "image" for part in row["messages"][0]["content"])]
    mixed = [new if length > limit else row for new, row, length in zip(unanswered, rows, lengths, strict=True)]
    skipped = VisionCollator(processor_of(family), on_bad="skip")(mixed)
    for made in (batch, skipped):
        assert made["long_records"].tolist() == [sum(length > limit for length in lengths), 0]
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            used = made["attention_mask"][index].bool()
            if length > limit:
                assert int(used.sum()) <= 2
                assert not (made["labels"][index] != -100).any()
            else:
                alone = plain([row])
                assert made["input_ids"][index][used].tolist() == alone["input_ids"][0].tolist()
                assert made["labels"][index][used].tolist() == alone["labels"][0].tolist()


# ---------------------------------------------------------------- the matrix


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", EVERY)
def test_a_step_from_images_and_messages(family, mode):
    trainer, moved = trained(family, mode)
    tokenizer, rows = trainer.processing_class.tokenizer, turns_of(family)[::-1]
    assert [tokenizer.decode(row[row != -100]) for row in trainer.labels] == [labelled(family, one) for one in rows]
    assert trainer._oddity == ""
    measured, loss = trainer.cal.visual_delta, trainer.state.log_history[0]["loss"]
    assert torch.tensor(loss).isfinite()
    assert not measured.has_contrast[measured.sample == 0].any(), "the row without an image"
    assert not measured.delta[measured.sample == 0].any()
    for sample in (1, 2):
        mine = measured.sample == sample
        assert measured.has_contrast[mine].all()
        assert float(measured.delta[mine].abs().mean()) > 0.01
    assert loss == pytest.approx(trained(family, "plain")[0].state.log_history[0]["loss"], abs=1e-4)
    if mode == "LoRA":
        assert all(moved[name] == ("lora_" in name) for name in moved if "lora_A" not in name)  # A's gradient is B = 0
        assert sum("lora_B" in name for name in moved) == len(layers_of(model_of(family)))
        return
    decoder = {id(one) for one in decoder_of(trainer.model).parameters()}
    assert all(moved[name] for name, one in trainer.model.named_parameters() if id(one) in decoder)
    assert any(moved[name] for name in moved if is_vision(name)) == (mode == "checkpointing")


@pytest.mark.parametrize("family", EVERY)
def test_evaluation_is_the_models_own_cross_entropy(family):
    trainer, _ = trained(family, "checkpointing")
    model, batch = trainer.model.eval(), dict(VisionCollator(processor_of(family))(records(family)[::-1]))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    got = trainer.evaluate(dataset(family))["eval_loss"]
    model.train()
    assert got == pytest.approx(float(own), rel=1e-4)


def test_mllamas_rows_without_images_stand_where_they_belong():
    """At both ends too, and whichever is the longest."""
    collator, rows = VisionCollator(processor_of("mllama")), records("mllama")
    batch = collator([rows[2], rows[0], rows[2], rows[1], rows[2]])
    images = collator([rows[0], rows[1]])
    seen = [1, 3]
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(batch[name][seen], images[name]), name
    length = images["cross_attention_mask"].shape[1]
    assert torch.equal(batch["cross_attention_mask"][seen][:, :length], images["cross_attention_mask"])
    for row in (0, 2, 4):
        assert not batch["pixel_values"][row].any()
        assert not batch["cross_attention_mask"][row].any()
        assert torch.equal(batch["input_ids"][row], batch["input_ids"][0])
    long = {**rows[2], "messages": [user(text("What colour is it? " * 9)), assistant("It is.")]}
    for mixed in ([rows[1], long], [long, rows[1]]):
        batch, place = collator(mixed), mixed.index(rows[1])
        used = batch["attention_mask"][place].bool()
        assert torch.equal(batch["input_ids"][place][used], collator([rows[1]])["input_ids"][0])
        assert int(used.sum()) < used.numel() == batch["cross_attention_mask"].shape[1]
