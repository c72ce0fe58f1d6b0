"""What a preview shows of a record, on every family's processor: all tokens of its batch, its labels, its whole text."""

import pytest
from PIL import Image

from seecal import VisionCollator, load_records
from seecal.constants import IGNORE_INDEX
from seecal.data.collators.conversation import ConversationEncoder
from seecal.data.sources.load import LocatedRecords
from seecal.scoring.previewed import LEFT_OUT, PUT_ASIDE, STOPS, Bad, Preview, checks_of
from seecal.scoring.previewer import Previewer
from tests.support import processors
from tests.support.tiny import tiny_image, tiny_llava_processor

FAMILIES = [
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "idefics3"),
    *("smolvlm", "paligemma", "gemma3", "mistral3", "ovis2", "mllama"),
]


def record(name, *turns, images=1):
    """Messages of turns (question, answer); the images stand before the first question."""
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": [{"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    messages[0]["content"] = [{"type": "image"}] * images + messages[0]["content"]
    return {"id": name, "messages": messages, "images": [tiny_image("red", (64, 48))] * images}


def rows_of(records):
    return list(LocatedRecords(records).rows())


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_the_batch_and_the_text(family):
    processor = getattr(processors, family)()
    collator = VisionCollator(processor, max_length=1000, on_long="truncate")
    previewer = Previewer(collator, "error")
    records = [record("one", ("What colour is it?", "It is größer 🙂."))]
    if family != "paligemma":  # one question and one answer
        records.append(record("more", ("What?", "It is red."), ("And now?", "It is blue."), images=2))
        records.append(record("text", ("What?", "It is red."), images=0))
    rows = rows_of(records)
    assert len(rows) == len(records)
    for row in rows:
        shown, bad = previewer.look(row, True)
        assert bad is None
        batch = collator([row.record])
        kept = batch["attention_mask"][0].bool()
        ids, labels = batch["input_ids"][0, kept].tolist(), batch["labels"][0, kept].tolist()
        found_ids, found_labels = [], []
        for piece in shown.pieces:
            at = len(found_ids)
            found_ids += ids[at : at + piece.tokens] if piece.images else [piece.token_id]
            found_labels += [piece.token_id if piece.label else IGNORE_INDEX] * piece.tokens
        assert found_ids == ids
        assert found_labels == labels
        numbers = [number for piece in shown.pieces for number in piece.images]
        assert numbers == list(range(1, len(row.record["images"]) + 1))
        text = ConversationEncoder(processor).encode(row.record, "").text
        answers = [turn["content"][0]["text"] for turn in row.record["messages"] if turn["role"] == "assistant"]
        labelled = "".join(piece.text for piece in shown.pieces if piece.label)
        assert all(answer.strip() in labelled for answer in answers)
        cursor = 0
        for piece in shown.pieces:
            at = text.find(piece.text, cursor)
            assert at >= 0 or piece.special, "only what the tokenizer adds itself is no part of the text"
            cursor = max(cursor, at + len(piece.text)) if at >= 0 else cursor
        assert not text[cursor:].strip()


def test_a_processor_that_fails_on_a_record(monkeypatch):
    processor = tiny_llava_processor()
    previewer = Previewer(VisionCollator(processor), "skip")
    call = type(processor).__call__

    def fail(self, images=None, text=None, **options):
        if "boom" in str(text):
            raise RuntimeError("boom")
        return call(self, images=images, text=text, **options)

    monkeypatch.setattr(type(processor), "__call__", fail)
    good, bad = rows_of([record("good", ("What?", "It is.")), record("bad", ("boom", "It is."))])
    assert previewer.look(good, True)[1] is None
    shown, found = previewer.look(bad, True)
    assert shown is None
    assert (found.kind, found.fate) == ("processor", PUT_ASIDE)
    assert found.reason.startswith("dataset: row 1: record 'bad': LlavaProcessor failed on them: boom")
    assert previewer.look(good, False) == (None, None), "nothing is made of what is not wanted"


def test_turns_that_are_not_learnt_are_no_answer():
    previewer = Previewer(VisionCollator(tiny_llava_processor(), train_on="last"), "skip")
    off = record("off", ("What?", "It is."), ("What?", "It is."))
    off["messages"][3]["train"] = False  # the others are learnt, but the last is what is trained on
    (row,) = rows_of([off])
    assert row.error is None
    _, found = previewer.look(row, True)
    assert (found.kind, found.fate) == ("answer", LEFT_OUT)


@pytest.mark.parametrize(
    ("images", "kind"), [(["none.png"], "missing"), (["bad.png"], "image"), (["../x.png"], "image")]
)
def test_rows_say_what_was_wrong_with_them(images, kind, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    rows = [{**record(name, ("What?", "It is.")), "images": images} for name in "ab"]
    located = list(LocatedRecords(rows, image_root=tmp_path).rows())
    previewer = Previewer(VisionCollator(tiny_llava_processor()), "error")
    assert [previewer.look(row, True)[1].kind for row in located] == [kind] * 2
    with pytest.raises(located[0].kind):
        load_records(rows, image_root=tmp_path)


def test_checks_are_by_kind_and_fate():
    bad = [Bad("long", "a", "cut"), Bad("format", "b", STOPS), Bad("long", "c", STOPS), Bad("long", "d", "cut")]
    assert [(check.kind, check.fate, check.count, check.first) for check in checks_of(bad)] == [
        ("format", STOPS, 1, "b"),
        ("long", "cut", 2, "a"),
        ("long", STOPS, 1, "c"),
    ]


@pytest.mark.parametrize(
    ("looked_at", "more", "stopped", "words"),
    [
        (1, False, False, "1 record looked at, all there are: every check passed"),
        (1000, True, False, "the first 1,000 records looked at: every check passed"),
        (2, True, True, "the first 2 records looked at, then stopped: every check passed"),
    ],
)
def test_the_verdict_says_how_much_was_looked_at(looked_at, more, stopped, words):
    preview = Preview("r", "stage 1 of 1", "m", {}, looked_at=looked_at, more=more, stopped=stopped)
    assert preview.verdict() == words
