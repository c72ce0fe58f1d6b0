"""seecal.evaluate: the figure is that of the answers, nothing is asked twice, nothing is left out quietly."""

import hashlib
import json

import pytest

import seecal
from seecal.evaluation import run
from seecal.evaluation.examples import Examples
from seecal.evaluation.metrics.table import metric_named
from seecal.evaluation.predictions import Predictions
from seecal.models.generate import answers
from tests.models.test_answers import llava
from tests.support.tiny import tiny_image

COLOURS = ["red", "blue", "green", "yellow"]
SHORT = {"max_new_tokens": 4, "resamples": 200}


@pytest.fixture(scope="module")
def tiny():
    return llava()


@pytest.fixture
def questions(tmp_path, tiny):
    """(folder, rows, the model's own answers): image and question, the true answers in a column."""
    rows = []
    for number in range(7):
        colour = COLOURS[number % 4]
        tiny_image(colour).save(tmp_path / f"{colour}.png")
        rows.append({"id": f"q{number}", "image": f"{colour}.png", "question": f"Colour {number}?"})
    asked = [
        {
            "id": row["id"],
            "messages": [{"role": "user", "content": row["question"]}],
            "images": [str(tmp_path / row["image"])],
        }
        for row in rows
    ]
    return tmp_path, rows, answers(*tiny, asked, max_new_tokens=4)


def written(folder, rows, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def measured(tiny, data, metric="exact", **settings):
    model, processor = tiny
    return seecal.evaluate(model, data, metric, processor=processor, **{"answers": "answers", **SHORT, **settings})


def test_the_figure_is_the_share_of_right_answers(questions, tiny):
    folder, rows, own = questions
    rows = [row | {"answers": [own[at]] if at % 2 else ["no", "never"]} for at, row in enumerate(rows)]
    data = written(folder, rows)
    out = folder / "out"
    found = measured(tiny, data, out=out, batch_size=3)
    assert found.value == pytest.approx(100 * 3 / 7)
    assert 0 <= found.low < found.value < found.high <= 100
    assert (found.records, found.bad) == (7, 0)
    assert [sample["prediction"] for sample in found.samples] == own
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["prediction"], line["references"]) for line in lines] == [
        (row["id"], said, row["answers"]) for row, said in zip(rows, own, strict=True)
    ]
    scores = [json.loads(line)["score"] for line in (out / "scores.jsonl").read_text().splitlines()]
    assert scores == [0, 1, 0, 1, 0, 1, 0]
    result = json.loads((out / "result.json").read_text())
    assert (result["value"], result["metric"], result["records"]) == (found.value, "exact", 7)
    assert measured(tiny, data, batch_size=2).to_json() == found.to_json()
    assert measured(tiny, data, limit=2).value == 50


def test_the_last_turn_is_the_true_answer(questions, tiny):
    folder, rows, own = questions
    forms = {"messages": ("role", "content", "user", "assistant"), "conversations": ("from", "value", "human", "gpt")}
    for form, (who, said, asking, answering) in forms.items():
        records = [
            {
                "id": row["id"],
                "image": row["image"],
                form: [{who: asking, said: f"<image>\n{row['question']}"}, {who: answering, said: true}],
            }
            for row, true in zip(rows, own, strict=True)
        ]
        data = written(folder, records)
        assert measured(tiny, data, answers=None).value == 100
    captions = [{"image": row["image"], "prompt": row["question"], "caption": "x"} for row in rows]
    found = measured(tiny, written(folder, captions), answers=None)
    assert [sample["prediction"] for sample in found.samples] == own
    assert found.value == 0


@pytest.mark.parametrize("metric", ["exact", "ocr", "iou"])
@pytest.mark.parametrize("true", ["[0.1, 0.2, 0.3, 0.4]", "[12]", "[]", '["a", "b"]', "[not a list"])
def test_a_last_turn_is_one_text_whatever_it_looks_like(metric, true):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": true}]
    (one,) = Examples([{"id": "q", "messages": turns}], metric_named(metric))
    if metric != "iou":
        assert one.references == [true]
        assert metric_named(metric).scores([true, "0.1", "12", "a"], [one.references] * 4) == [1, 0, 0, 0]
    elif true.startswith("[0.1"):
        assert one.references == [[0.1, 0.2, 0.3, 0.4]]
    else:
        assert "is not four numbers" in one.error


def test_a_column_of_answers_goes_before_the_last_turn(questions, tiny):
    folder, rows, own = questions
    records = [
        {
            "id": row["id"],
            "image": row["image"],
            "messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": "never"}],
            "true": own[at],
        }
        for at, row in enumerate(rows)
    ]
    assert measured(tiny, written(folder, records), answers="true").value == 100
    without = [{**record, "messages": record["messages"][:1]} for record in records]
    assert measured(tiny, written(folder, without), answers="true").value == 100


def test_an_evaluation_that_was_stopped_goes_on(questions, tiny, monkeypatch):
    folder, rows, own = questions
    data = written(folder, [row | {"answers": own[at]} for at, row in enumerate(rows)])
    out, asked = folder / "out", []
    generated = run.generated

    def stops(model, processor, prompts, **settings):
        if len(asked) >= 4:
            raise KeyboardInterrupt
        asked.extend(prompt.name for prompt in prompts)
        return generated(model, processor, prompts, **settings)

    monkeypatch.setattr(run, "generated", stops)
    with pytest.raises(KeyboardInterrupt):
        measured(tiny, data, out=out, batch_size=2)
    with (out / "predictions.jsonl").open("a") as file:
        file.write('{"id": "q4", "pred')  # what a kill in the middle of a line leaves
    asked.clear()
    monkeypatch.setattr(run, "generated", lambda *given, **rest: asked.extend(given[2]) or generated(*given, **rest))
    found = measured(tiny, data, out=out, batch_size=2)
    assert [prompt.name for prompt in asked] == ["record 'q4'", "record 'q5'", "record 'q6'"]
    assert found.value == 100
    assert [sample["prediction"] for sample in found.samples] == own
    asked.clear()
    assert measured(tiny, data, "relaxed", out=out).records == 7, "another metric on the same answers"
    assert asked == []


def test_an_image_of_the_same_name_in_another_folder_is_another(questions, tiny):
    folder, rows, _ = questions
    for name in ("a", "b", "a/c"):
        (folder / name).mkdir()
        tiny_image("green").save(folder / name / "red.png")
    rows = [{**rows[0], "answers": "x"}]
    out, keys = folder / "out", {}
    for image in ("red.png", "a/red.png", "b/red.png", "a/c/red.png", str(folder / "b" / ".." / "a" / "red.png")):
        data = written(folder, [rows[0] | {"image": image}])
        (one,) = Examples(data, metric_named("exact"), answers="answers")
        keys[image] = one.key
    *four, again = keys.values()
    assert len(set(four)) == 4
    assert again == keys["a/red.png"], "the same file"
    whole = json.dumps(["q0", one.record["messages"][:-1], ["red.png"]])
    assert four[0] == hashlib.blake2b(whole.encode(), digest_size=16).hexdigest(), "as it was: older folders go on"
    data = written(folder, [rows[0] | {"image": "a/red.png"}])
    measured(tiny, data, out=out)
    written(folder, [rows[0] | {"image": "b/red.png"}])
    with pytest.raises(ValueError, match=r"begun with another data: fingerprint was .* Set --out to a new folder"):
        measured(tiny, data, out=out)
    with pytest.raises(ValueError, match="its answer to 'q0' is not one to this data's 'q0'"):
        measured(tiny, data, against=out)


def test_answers_stay_those_of_a_folder_that_was_moved(questions, tiny):
    folder, rows, _ = questions
    (folder / "before" / "a").mkdir(parents=True)
    tiny_image("green").save(folder / "before" / "a" / "red.png")
    data = written(folder / "before", [{**rows[0], "image": "a/red.png", "answers": "x"}])
    found = measured(tiny, data, out=folder / "out")
    data.parent.rename(folder / "after")
    assert measured(tiny, folder / "after" / data.name, out=folder / "out").samples == found.samples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 5}, "another settings: max_new_tokens was 4 and is 5"),
        ({"generation": {"num_beams": 2}}, "another settings: generation"),
        ({"limit": 3}, "another data: fingerprint"),
    ],
)
def test_a_folder_with_other_answers_is_refused(questions, tiny, change, message):
    folder, rows, _ = questions
    data = written(folder, [row | {"answers": "x"} for row in rows])
    measured(tiny, data, out=folder / "out")
    with pytest.raises(ValueError, match=message):
        measured(tiny, data, out=folder / "out", **change)


def test_a_folder_of_something_else_and_another_model_are_refused(questions, tiny, tmp_path):
    folder, rows, _ = questions
    data = written(folder, [row | {"answers": "x"} for row in rows])
    with pytest.raises(ValueError, match=r"no _manifest.json here, and it is not empty"):
        measured(tiny, data, out=folder)
    measured(tiny, data, out=folder / "out")
    other = llava()
    other[0].lm_head.weight.data.mul_(-1)
    with pytest.raises(ValueError, match="another model: weights was"):
        measured(other, data, out=folder / "out")


def test_what_cannot_be_asked_stops_or_is_named_and_counted(questions, tiny):
    folder, rows, own = questions
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:60])  # its header is whole
    rows = [row | {"answers": own[at]} for at, row in enumerate(rows)]
    rows[1]["image"] = "gone.png"
    rows[3]["image"] = "broken.png"
    del rows[4]["answers"]
    data = written(folder, rows)
    with pytest.raises((ValueError, FileNotFoundError), match=r"record 'q1'.*gone\.png.*on_bad to skip"):
        measured(tiny, data)
    found = measured(tiny, data, on_bad="skip", out=folder / "out", batch_size=2)
    assert (found.records, found.bad, found.value) == (4, 3, 100)
    assert [name in error for name, error in zip(("q1", "q3", "q4"), found.first_bad, strict=True)] == [True] * 3
    assert "no column 'answers'" in found.first_bad[2]
    assert [sample["id"] for sample in found.samples] == ["q0", "q2", "q5", "q6"]
    assert [sample["prediction"] for sample in found.samples] == [own[at] for at in (0, 2, 5, 6)]
    for row in rows:
        row["image"] = "gone.png"
    with pytest.raises(ValueError, match=r"not one of 7 records can be asked\. The first"):
        measured(tiny, written(folder, rows), on_bad="skip")


def test_fewer_people_than_a_metric_compares_are_told(questions, tiny):
    folder, rows, own = questions
    with pytest.raises(ValueError, match=r"2 true answers, but this metric compares at least 4 people's"):
        measured(tiny, written(folder, [row | {"answers": [own[at]] * 2} for at, row in enumerate(rows)]), "vqa")
    ten = written(folder, [row | {"answers": [own[at]] * 2 + ["other"] * 8} for at, row in enumerate(rows)])
    assert measured(tiny, ten, "vqa").value == pytest.approx(60)


def test_without_an_answer_at_the_end(questions, tiny):
    folder, rows, _ = questions
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    data = written(folder, [{"id": "q", "messages": turns}])
    with pytest.raises(ValueError, match=r"its last turn is not the assistant's.*Name the column that does: answers"):
        measured(tiny, data, answers=None)
    with pytest.raises(ValueError, match=r"no known format has its keys: id, image, question.*name it: answers"):
        measured(tiny, written(folder, rows), answers=None)


def test_kinds_of_records_boxes_and_other_columns(questions, tiny):
    folder, rows, own = questions
    kinds = ["x", "x", "x", "x", "x", "x", "y"]
    rows = [
        row | {"answers": own[at] if at < 3 else "no way", "question_type": kinds[at], "dataset": "HME100k"}
        for at, row in enumerate(rows)
    ]
    found = measured(tiny, written(folder, rows), "ocr")
    right = sum(sample["score"] for sample in found.samples)
    assert found.value == pytest.approx(1000 * right / 7)
    assert found.groups["x"][1] == 6
    assert found.groups["y"] == (0, 1)
    boxes = written(folder, [{**row, "answers": [0, 0, 1, 1]} for row in rows])
    found = measured(tiny, boxes, "iou")
    assert found.value == found.details["acc@0.5"] == 0
    assert [sample["references"] for sample in found.samples] == [[[0, 0, 1, 1]]] * 7
    assert found.samples[0].keys() >= {"acc@0.1", "center"}
    stars = [{**row, "answers": "A", "category": kinds[at]} for at, row in enumerate(rows)]
    found = measured(tiny, written(folder, stars), "choice")
    assert found.value == pytest.approx((found.groups["x"][0] + found.groups["y"][0]) / 2)


def test_two_models_on_the_same_records(questions, tiny):
    folder, rows, own = questions
    data = written(folder, [row | {"answers": own[at]} for at, row in enumerate(rows)])
    other = llava()
    other[0].lm_head.weight.data.mul_(-1)
    out = folder / "out"
    found = measured(tiny, data, against=other[0], against_processor=other[1], out=out)
    told = found.against
    assert (found.value, told.value, told.difference, told.records) == (100, 0, 100, 7)
    assert (told.low, told.high) == (100, 100)
    assert told.p == pytest.approx(2 / 201)
    again = measured(other, data, against=out)
    assert again.against.difference == -100
    assert again.against.value == 100
    assert "-100.00" in _printed(again)
    assert measured(tiny, data, against=out / "against").against == told
    few = written(folder, [row | {"answers": "x"} for row in rows[:3]], "few.jsonl")
    with pytest.raises(ValueError, match="it has 7 answers, and there are 3 questions"):
        measured(tiny, few, against=out)
    rows[2]["question"] = "Something else?"
    changed = written(folder, [row | {"answers": "x"} for row in rows], "changed.jsonl")
    with pytest.raises(ValueError, match="its answer to 'q2' is not one to this data's 'q2'"):
        measured(tiny, changed, against=out)


def _printed(found):
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table())
    return console.export_text()


def test_arguments_out_of_their_range(questions, tiny):
    folder, rows, _ = questions
    data = written(folder, [row | {"answers": "x"} for row in rows])
    for settings in ({"batch_size": 0}, {"max_new_tokens": 0}, {"limit": 0}, {"on_bad": "drop"}, {"format": "x"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            measured(tiny, data, **settings)
    with pytest.raises(ValueError, match="metric='bleu' is not known"):
        measured(tiny, data, "bleu")
    with pytest.raises(ValueError, match=r"pass processor="):
        seecal.evaluate(tiny[0], data, "exact", answers="answers")
    with pytest.raises(FileNotFoundError):
        measured(tiny, folder / "none.jsonl")


@pytest.mark.parametrize("true", ["\ud83d", ["a", "\\\udc00 é 🦊"], '["\\ud83d"]'])
def test_half_a_surrogate_pair_in_a_true_answer(questions, tiny, true):
    folder, rows, _ = questions
    data = written(folder, [row | {"answers": true} for row in rows[:2]])
    found = measured(tiny, data, out=folder / "out")
    for name in ("predictions.jsonl", "scores.jsonl"):
        lines = [json.loads(line) for line in (folder / "out" / name).read_text("utf8").splitlines()]
        assert [line["references"] for line in lines] == [sample["references"] for sample in found.samples]
    assert measured(tiny, data, out=folder / "out").samples == found.samples


def test_a_line_that_cannot_be_read_is_named(tmp_path):
    manifest = {part: {} for part in ("data", "model", "settings", "versions")}
    Predictions(tmp_path / "out", manifest).close()
    (tmp_path / "out" / "predictions.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl: line 1 cannot be read"):
        Predictions(tmp_path / "out", manifest)
