"""seecal.preview: it shows what training learns, counts what training cannot use, and reads no further than it is asked."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import seecal
from seecal import CALOptions, VisionCollator
from seecal.constants import IGNORE_INDEX
from seecal.data.collators.record_check import RecordCheck
from seecal.models.loading import load_vlm
from seecal.recipes.preview import in_turn
from seecal.recipes.recipe import read
from seecal.recipes.run import Run
from seecal.recipes.stage_runner import StageRunner
from seecal.scoring.previewed import CUT, LEFT_OUT, PUT_ASIDE, STOPS
from tests.support.recipe_files import recipe_file
from tests.support.tiny import MARKED_TEMPLATE, PLAIN_TEMPLATE, tiny_image, tiny_llava_processor

QUIET = Console(quiet=True)


def said(question, *answers, image="red.png", **keys):
    """A row in LLaVA's format; each further answer is to "And now?"."""
    chat = []
    for number, answer in enumerate(answers):
        asked = question if number == 0 else "And now?"
        chat += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"conversations": chat, **({"image": image} if image else {}), **keys}


GOOD = [
    said("<image>\nWhat colour is it?", "It is red.", id="one"),
    said("<image>\nWhat colour is it?", "It is red.", "It is it.", "red", id="turns"),
    said("What is a user?", "It is a user.", image=None, id="text"),
    said("<image> What <image>", "It is red. It is.", image=["red.png", "blue.png"], id="two"),
    said("<image>What?", "Größe 🙂 is it. It is it.", id="bytes"),
    said("<image>What?", "It is red. " * 6, id="long"),
]


@pytest.fixture
def made(tiny, tmp_path):
    """Writes rows, their images and a recipe; the recipe's path."""

    def make(rows=GOOD, **changes):
        for colour in ("red", "blue"):
            tiny_image(colour, (48, 32)).save(tmp_path / f"{colour}.png")
        data = tmp_path / "data.json"
        data.write_text(json.dumps(rows), "utf8")
        settings = {"data": str(data), "max_steps": 1, **changes}
        return recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / "out", **settings)

    return make


def labels_of(record):
    """The labels [L] of what a preview shows of a record."""
    return [
        piece.token_id if piece.label else IGNORE_INDEX
        for piece in record.pieces
        if not piece.cut
        for _ in range(piece.tokens)
    ]


class _Caught(Exception):
    pass


def trained(file, monkeypatch):
    """id → (input_ids, labels) of each record that `seecal train` would learn, by its own trainer's own collator."""
    found = {}

    def look(runner, trainer, checkpoint):
        for record in trainer.train_dataset:
            batch = trainer.data_collator([record])
            kept = batch["attention_mask"][0].bool()
            labels = batch["labels"][0, kept]
            if (labels != IGNORE_INDEX).any():
                found[record["id"]] = batch["input_ids"][0, kept].tolist(), labels.tolist()
        raise _Caught

    monkeypatch.setattr(StageRunner, "train", look)
    with pytest.raises(_Caught):
        Run(read(file), quiet=True).go(resume=False)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_on": "last"},
        {"chat_template": MARKED_TEMPLATE.replace("<|start|>", "<s><|start|>", 1)},
        {"max_length": 44, "on_bad": "skip"},
        {"max_length": 44, "on_long": "drop", "pad_to_multiple_of": 16},
        {"contrast": "blur", "contrast_strength": 4.0, "image_decoding": "exact"},
    ],
    ids=lambda changes: " ".join(changes) or "plain",
)
def test_labels_are_those_that_the_trainer_learns(changes, made, monkeypatch):
    file = made(**changes)
    preview = seecal.preview(file, records=len(GOOD), console=QUIET)
    expected = trained(file, monkeypatch)
    assert {record.id: labels_of(record) for record in preview.records} == {
        name: labels for name, (_, labels) in expected.items()
    }
    assert expected, "something is compared"
    for record in preview.records:
        ids = [piece.token_id for piece in record.pieces if not piece.cut and not piece.images]
        image = tiny_llava_processor().tokenizer.convert_tokens_to_ids("<image>")
        assert ids == [index for index in expected[record.id][0] if index != image]
        assert record.tokens == len(expected[record.id][0])
        assert record.labels == sum(label != IGNORE_INDEX for label in expected[record.id][1])
    left = len(GOOD) - len(preview.records)
    assert sum(check.count for check in preview.checks if check.fate in (LEFT_OUT, PUT_ASIDE)) == left


def test_the_text_is_the_rendered_template(made):
    preview = seecal.preview(made(), records=9, console=QUIET)
    one, _, text, two, many_bytes, _ = preview.records
    shown = "".join("<image>" if piece.images else piece.text for piece in one.pieces)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
    ]
    assert shown == tiny_llava_processor().apply_chat_template(messages, tokenize=False)
    assert "Größe 🙂 is it." in "".join(piece.text for piece in many_bytes.pieces)
    assert [piece.text for piece in one.pieces if piece.special] == ["<|start|>", "<|end|>", "<|start|>", "<|end|>"]
    assert [(piece.images, piece.tokens) for piece in two.pieces if piece.images] == [((1,), 16), ((2,), 16)]
    assert [(picture.width, picture.height) for picture in two.pictures] == [(48, 32)] * 2
    assert text.pictures == []
    assert not any(piece.images for piece in text.pieces)
    assert (preview.looked_at, preview.more, preview.checks) == (6, False, [])
    assert preview.verdict() == "6 records looked at, all there are: every check passed"


def test_images_side_by_side_are_one_piece(made):
    rows = [said("<image><image>What?", "It is.", image=["red.png", "blue.png"])]
    (record,) = seecal.preview(made(rows), console=QUIET).records
    assert [(piece.images, piece.tokens) for piece in record.pieces if piece.images] == [((1, 2), 32)]


def test_what_is_cut_is_shown_as_cut(made):
    (record,) = seecal.preview(made(GOOD[-1:], max_length=30), console=QUIET).records
    assert record.tokens == 30
    cut = [piece for piece in record.pieces if piece.cut]
    assert cut
    assert not any(piece.label for piece in cut)
    assert record.pieces[-len(cut) :] == cut


@pytest.mark.parametrize("contrast", ["drop", "blur", "swap"])
def test_delta_and_weights_are_those_of_the_model(contrast, made, tiny):
    options = {"contrast": contrast, "contrast_strength": {"blur": 4.0}.get(contrast)}
    options = {name: value for name, value in options.items() if value is not None}
    rows = [GOOD[0], {**GOOD[1], "image": "blue.png"}, GOOD[2]]
    preview = seecal.preview(made(rows, **options), records=3, model=tiny / "model", console=QUIET)
    one, turns, text = preview.records
    model, processor = load_vlm(str(tiny / "model"))
    chosen = CALOptions(**options)
    collator = VisionCollator(processor, contrast=None if contrast == "drop" else contrast, strength=chosen.strength)
    records = seecal.load_records(Path(preview.recipe).parent / "data.json")
    batch = dict(collator([records[0], records[1]]))  # each has the other's image to swap with
    delta = seecal.visual_delta(model, batch, contrast=contrast, options=chosen)
    mine = [piece for piece in one.pieces if piece.label]
    first = delta.sample == 0
    assert [piece.delta for piece in mine] == pytest.approx(delta.delta[first].tolist(), abs=1e-4)
    weights = seecal.token_weights(delta.delta, delta.runs)[first].tolist()
    assert [piece.weight for piece in mine] == pytest.approx(weights, abs=1e-4)
    assert all(record.measured for record in preview.records)
    assert {piece.delta for piece in text.pieces} == {None}, "no image before it"
    assert {piece.weight for piece in text.pieces if piece.label} == {1.0}
    assert all(piece.delta is None for piece in turns.pieces if not piece.label)


def bad_rows(folder):
    """One row of each kind that loading or the collator can find, and good ones around them."""
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (64, 64), "red").save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:80])
    (folder / "half.jpg").write_bytes(b"")
    return [
        said("<image>What?", "It is red.", id="good"),
        said("<image>What?", "It is.", image="none.png", id="missing"),
        said("<image>What?", "It is.", image="text.png", id="no image"),
        said("<image>What?", "It is.", image="half.jpg", id="empty image"),
        said("<image>What?", "It is.", image="half.png", id="half an image"),
        said("<image>What?", "", id="empty answer"),
        said("<image>What?", id="no answer", conversations=[{"from": "human", "value": "<image>What?"}]),
        said("<image><image>What?", "It is.", id="two marks"),
        said("<image>What?", "It is.", id="role", conversations=[{"from": "nobody", "value": "What?"}]),
        said("<image>What?", "It is <|start|>.", id="good too"),
        said("<image>What?", "It is.", image=None, id="text", conversations=[]),
    ]


EXPECTED = {"format": 2, "missing": 1, "image": 3, "answer": 3}


@pytest.mark.parametrize("on_bad", ["skip", "error"])
def test_bad_records_are_counted_by_kind(on_bad, made, tmp_path):
    preview = seecal.preview(made(bad_rows(tmp_path), on_bad=on_bad), console=QUIET)
    counts = {}
    for check in preview.checks:
        counts[check.kind] = counts.get(check.kind, 0) + check.count
    assert counts == EXPECTED
    assert [record.id for record in preview.records] == ["good", "good too"]
    assert preview.looked_at == 11
    assert preview.verdict() == "11 records looked at, all there are: 9 failed a check"
    fates = {(check.kind, check.count): check.fate for check in preview.checks}
    loading = LEFT_OUT if on_bad == "skip" else STOPS
    assert fates[("missing", 1)] == fates[("format", 2)] == fates[("answer", 3)] == loading
    # Half an image has a header, so only its batch finds it
    images = {check.fate: check.count for check in preview.checks if check.kind == "image"}
    assert images == ({LEFT_OUT: 2, PUT_ASIDE: 1} if on_bad == "skip" else {STOPS: 3})
    assert "'missing'" in next(check.first for check in preview.checks if check.kind == "missing")
    assert all("\n" not in check.first for check in preview.checks)


def test_loading_for_training_leaves_out_the_same(made, tmp_path):
    file = made(bad_rows(tmp_path), on_bad="skip")
    preview = seecal.preview(file, console=QUIET)
    (stage,) = read(file).stages
    loaded = Run(read(file), quiet=True)._load(stage.data, stage)
    left_out = sum(check.count for check in preview.checks if check.fate == LEFT_OUT)
    assert len(loaded) == preview.looked_at - left_out


REFUSING = PLAIN_TEMPLATE.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}",
)
SYSTEM = [{"from": "system", "value": "Be a user."}, *GOOD[0]["conversations"]]


@pytest.mark.parametrize(
    ("row", "changes", "kind", "fate"),
    [
        (said("<image>What?", "an <image> is it"), {}, "format", STOPS),
        ({**GOOD[0], "conversations": SYSTEM}, {"chat_template": REFUSING}, "template", STOPS),
        ({**GOOD[0], "conversations": SYSTEM}, {"chat_template": REFUSING, "on_bad": "skip"}, "template", LEFT_OUT),
        (said("<image>What?", "It is red. " * 9), {"max_length": 40}, "long", CUT),
        (said("<image>What?", "It is red. " * 9), {"max_length": 40, "on_long": "drop"}, "long", LEFT_OUT),
        (said("<image>What?", "It is red. " * 9), {"max_length": 40, "on_long": "error"}, "long", STOPS),
        (said("<image>What?", "It is red."), {"max_length": 16}, "image beyond", STOPS),
        (said("<image>" + "What is it? " * 9, "It is."), {"max_length": 30}, "answer beyond", STOPS),
        (
            said("<image>" + "What is it? " * 9, "It is."),
            {"max_length": 30, "on_bad": "skip"},
            "answer beyond",
            PUT_ASIDE,
        ),
    ],
)
def test_what_only_a_processor_knows(row, changes, kind, fate, made):
    preview = seecal.preview(
        made([said("a", "b", image=None, id="good"), {**row, "id": "bad"}], **changes), console=QUIET
    )
    (check,) = preview.checks
    assert (check.kind, check.fate, check.count) == (kind, fate, 1)
    assert "bad" in check.first or "row 1" in check.first
    assert [record.id for record in preview.records] == ["good"] + ["bad"] * (fate == CUT)


def messages(*turns, **keys):
    """A row of messages with parts, whose texts are no marks."""
    return {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
        ],
        **keys,
    }  # fmt: skip


def test_image_tokens_and_turns_that_are_not_learnt(made):
    rows = [
        messages(("user", "What?"), ("assistant", "It is."), id="good"),
        messages(("user", "an <image> is it"), ("assistant", "It is."), id="token"),
        messages(("user", "What?"), ("assistant", "a <image>"), id="token too"),
    ]
    preview = seecal.preview(made(rows), console=QUIET)
    assert [(check.kind, check.count) for check in preview.checks] == [("token", 2)]


def test_weights_that_records_bring(made, tiny):
    rows = [said("<image>What?", "It is red.", id="good"), said("<image>What?", "It is red.", id="bad")]
    count = seecal.preview(made(rows), console=QUIET).records[0].labels
    for row, weights in zip(rows, ([0.25] * count, [1.0]), strict=True):
        row["weights"] = weights
    for model in (None, tiny / "model"):
        preview = seecal.preview(made(rows), model=model, console=QUIET)
        assert [(check.kind, check.fate) for check in preview.checks] == [("weights", STOPS)]
        assert [piece.weight for piece in preview.records[0].pieces if piece.label] == [0.25] * count


def test_it_stops_reading_where_it_is_told(made, monkeypatch):
    looked = []
    monkeypatch.setattr(RecordCheck, "__call__", lambda self, record: looked.append(record["id"]))
    preview = seecal.preview(made(), records=1, check=2, console=QUIET)
    assert looked == ["one", "turns"]
    assert [record.id for record in preview.records] == ["one"]
    assert (preview.looked_at, preview.more) == (2, True)
    assert preview.verdict() == "the first 2 records looked at: every check passed"
    assert seecal.preview(made(), records=3, check=1, console=QUIET).looked_at == 3
    assert seecal.preview(made(), records=0, check=1, console=QUIET).records == []


def test_ctrl_c_leaves_what_was_found(made, monkeypatch):
    def check(self, record):
        if record["id"] == "two":
            raise KeyboardInterrupt

    monkeypatch.setattr(RecordCheck, "__call__", check)
    preview = seecal.preview(made(), console=QUIET)
    assert preview.stopped
    assert [record.id for record in preview.records] == ["one", "turns", "text"]
    assert preview.verdict() == "the first 3 records looked at, then stopped: every check passed"


def test_sources_take_turns(made, tmp_path):
    assert list(in_turn([iter("ab"), iter(""), iter("xyz")])) == ["a", "x", "b", "y", "z"]
    (tmp_path / "other.json").write_text(json.dumps([said("What?", "It is.", image=None, id="other")]), "utf8")
    file = made(data=[str(tmp_path / "data.json"), str(tmp_path / "other.json")])
    assert [record.id for record in seecal.preview(file, records=3, console=QUIET).records] == ["one", "other", "turns"]


def test_stages_and_overrides(made):
    stages = [{"name": "align", "train_on": "last"}, {"name": "tune"}]
    file = made(GOOD[1:2], stages=stages)
    last = seecal.preview(file, console=QUIET)
    first = seecal.preview(file, stage=1, console=QUIET)
    assert (first.stage, last.stage) == ("stage 1 of 2 (align)", "stage 2 of 2 (tune)")
    assert first.records[0].labels < last.records[0].labels
    other = seecal.preview(file, console=QUIET, overrides=["--stages.2.train_on", "last", "--max_length", "99"])
    assert other.records[0].labels == first.records[0].labels
    assert other.settings["max_length"] == 99
    for wrong in (0, 3, True):
        with pytest.raises(ValueError, match=f"stage={wrong}: this recipe has 2. Give a number from 1 to 2"):
            seecal.preview(file, stage=wrong, console=QUIET)


def test_a_recipe_for_gpus_is_looked_at_without_one(made):
    preview = seecal.preview(made(bf16=True, use_cpu=False, tf32=True), console=QUIET)
    assert len(preview.records) == 4


def test_keys_and_templates_that_warn_are_notes(made):
    row = said("<image>What?", "It is.", id="one", colour="red")
    endless = PLAIN_TEMPLATE.replace("<|end|>", "")
    preview = seecal.preview(made([row], chat_template=endless), console=QUIET)
    assert any("'colour'" in note for note in preview.notes)
    assert any("nothing teaches the model to stop" in note for note in preview.notes)


def test_what_is_wrong_is_one_line(made, tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        seecal.preview("nowhere.yaml", console=QUIET)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        seecal.preview(made(data="none.json"), console=QUIET)
    with pytest.raises(ValueError, match="no such folder"):
        seecal.preview(made(), model="./no/model", console=QUIET)
    for name, value in (("records", -1), ("check", 0), ("records", True)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            seecal.preview(made(), **{name: value}, console=QUIET)
    words = tmp_path / "words"
    shutil.copytree(tiny / "model", words)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (words / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="processor"):
        seecal.preview(made(model=str(words)), console=QUIET)


def test_a_model_that_does_not_fit_the_processor(made, tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny / "model", other)
    config = json.loads((other / "config.json").read_text("utf8"))
    config["image_token_index"] = config["image_token_id"] = 7
    (other / "config.json").write_text(json.dumps(config), "utf8")
    with pytest.raises(ValueError, match="puts image features at id 7"):
        seecal.preview(made(), model=other, console=QUIET)
    assert seecal.preview(made(model=str(other)), console=QUIET).records, "without --model no weights are looked at"


def test_no_weights_are_loaded_without_a_model(made, tiny, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny / "model", bare)
    (bare / "model.safetensors").unlink()
    assert len(seecal.preview(made(model=str(bare)), console=QUIET).records) == 4
    with pytest.raises(ValueError, match="bare"):
        seecal.preview(made(), model=bare, console=QUIET)
