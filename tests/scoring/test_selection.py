"""seecal.filter: which records go and why, and a data set that comes back in its own format."""

import json
import tarfile

import datasets
import numpy as np
import pytest

import seecal
from seecal.data.sources.load import LocatedRecords
from seecal.scoring import read_scores
from seecal.scoring.write_back import write_back
from tests.scoring.test_score import write_llava
from tests.support import sources
from tests.support.tiny import tiny_llava, tiny_llava_processor


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(scores of 24 records of which every fifth has no image, the data)."""
    folder = tmp_path_factory.mktemp("scored")
    data = write_llava(folder / "data", 24)
    score(data, folder / "scores")
    return folder / "scores", data


def score(data, out, **options):
    options = {"processor": tiny_llava_processor(), "records_per_shard": 5, "logprobs": True, **options}
    return seecal.score(tiny_llava().eval(), data, out, **options)


def truth(folder):
    """row -> (mean Δ, share of tokens below -1, mean gain) of the records with an image, token by token."""
    found = {}
    for record in read_scores(folder):
        seen = record.columns["has_contrast"]
        if seen.any():
            deltas = [float(delta) for delta, yes in zip(record.columns["delta"], seen, strict=True) if yes]
            gain = np.mean(
                record.columns["logprob_with"].astype(float) - record.columns["logprob_without"].astype(float)
            )
            found[record.row] = (np.mean(deltas), sum(delta < -1 for delta in deltas) / len(deltas), float(gain))
    return found


def ids(path):
    return [row["id"] for row in json.loads(path.read_text("utf8"))]


def log_of(out):
    return [json.loads(line) for line in (out.parent / f"{out.name}.removed.jsonl").read_text("utf8").splitlines()]


def test_contradictory_records_go(scored, tmp_path):
    scores, data = scored
    out, found = tmp_path / "kept.json", truth(scores)
    limit = sorted(share for _, share, _ in found.values())[10]
    report = seecal.filter(scores, out, max_contradictory=limit)
    gone = [row for row, (_, share, _) in found.items() if share > limit]
    assert 0 < len(gone) < len(found)
    assert ids(out) == [f"r{row}" for row in range(24) if row not in gone]
    rows = {row["id"]: row for row in json.loads(data.read_text("utf8"))}
    assert json.loads(out.read_text("utf8")) == [rows[name] for name in ids(out)]
    log = log_of(out)
    assert [line["row"] for line in log] == gone
    assert {line["why"] for line in log} == {"contradictory"}
    assert [line["value"] for line in log] == pytest.approx([found[row][1] for row in gone], abs=1e-4)
    assert (report.kept, report.removed, report.text_only) == (24 - len(gone), len(gone), 4)
    assert report.reasons == {"contradictory": len(gone)}


@pytest.mark.parametrize("below", [-1.0, -0.2])
def test_from_where_a_token_is_contradictory(scored, tmp_path, below):
    scores, _ = scored
    report = seecal.filter(scores, tmp_path / "kept.json", max_contradictory=0.0, below=below)
    expected = sum(
        bool((record.columns["delta"][record.columns["has_contrast"]] < below).any()) for record in read_scores(scores)
    )
    assert report.removed == expected


def test_low_means_go(scored, tmp_path):
    scores, _ = scored
    found = truth(scores)
    middle = sorted(mean for mean, _, _ in found.values())[8] + 1e-9
    seecal.filter(scores, tmp_path / "kept.json", min_delta=middle)
    assert [line["row"] for line in log_of(tmp_path / "kept.json")] == [
        row for row, (mean, _, _) in found.items() if mean < middle
    ]


def test_only_tokens_with_an_image_before_them_count(tmp_path):
    """The first answer comes before the image: its Δ of 0 would hide what the image says of the second."""
    turns = [*sources.turn("a b", "It is. " * 8), *sources.turn("<image>a", "It is red.")]
    data = write_llava(tmp_path / "data", 2, r1={"conversations": turns})
    score(data, tmp_path / "scores")
    (mixed,) = [record for record in read_scores(tmp_path / "scores") if record.row == 1]
    seen = mixed.columns["has_contrast"]
    assert 0 < seen.sum() < len(seen)
    seecal.filter(tmp_path / "scores", tmp_path / "kept.json", min_delta=1e9)
    (line,) = [line for line in log_of(tmp_path / "kept.json") if line["row"] == 1]
    assert line["value"] == pytest.approx(float(mixed.columns["delta"][seen].mean()), abs=1e-4)


@pytest.mark.parametrize(("by", "place"), [("delta", 0), ("gain", 2)])
def test_the_top_stays(scored, tmp_path, by, place):
    scores, _ = scored
    found = truth(scores)
    report = seecal.filter(scores, tmp_path / "kept.json", top=0.7, by=by)
    best = sorted(found, key=lambda row: -found[row][place])[: round(0.7 * len(found))]
    assert report.threshold == pytest.approx(found[best[-1]][place], abs=1e-6)
    gone = [line["row"] for line in log_of(tmp_path / "kept.json")]
    assert gone == [row for row in found if row not in best]
    assert seecal.filter(scores, tmp_path / "all.json", top=1.0).removed == 0
    assert seecal.filter(scores, tmp_path / "none.json", top=0.0).kept == 4, "those without an image"


def test_the_threshold_is_vigs(scored, tmp_path):
    """The samples that weighting="vig" keeps with it are those that the filter keeps."""
    scores, data = scored
    report = seecal.filter(scores, tmp_path / "kept.json", top=0.5, by="gain")
    options = seecal.CALOptions(weighting="vig", threshold=report.threshold - 1e-6)
    score(data, tmp_path / "vig", options=options)
    kept = set(ids(tmp_path / "kept.json"))
    weighted = {record.record for record in read_scores(tmp_path / "vig") if record.columns["weight"].any()}
    assert weighted <= kept
    assert {f"r{row}" for row in truth(scores)} - weighted >= {f"r{row}" for row in range(24)} - kept


def test_what_is_there_is_not_written_over(scored, tmp_path):
    (tmp_path / "kept.json").write_text("mine")
    with pytest.raises(ValueError, match=r"kept.json: is there already. Set --out to a new name"):
        seecal.filter(scored[0], tmp_path / "kept.json", top=0.5)
    assert (tmp_path / "kept.json").read_text() == "mine"


def test_rows_without_scores_go(tmp_path):
    data = write_llava(tmp_path / "data", 8, r2={"conversations": [{"from": "human", "value": "<image>a"}]})
    score(data, tmp_path / "scores", on_bad="skip")
    report = seecal.filter(tmp_path / "scores", tmp_path / "kept.json", min_delta=-1e9)
    assert ids(tmp_path / "kept.json") == [f"r{row}" for row in range(8) if row != 2]
    assert report.reasons == {"not scored": 1}
    (line,) = log_of(tmp_path / "kept.json")
    assert "no assistant turn" in line["value"]


@pytest.mark.parametrize("writer", sources.WRITERS.values(), ids=sources.WRITERS)
def test_every_format_comes_back(tmp_path, writer):
    """The kept rows, read again, are the records that they were."""
    folder = sources.images_in(tmp_path / "data")
    data = writer(folder, sources.SIMPLE)
    root = None if hasattr(data, "__fspath__") else folder
    score(data, tmp_path / "scores", image_root=root)
    found = truth(tmp_path / "scores")
    limit = sorted(mean for mean, _, _ in found.values())[2]
    names = {"captions_csv": "metadata.csv", "captions_jsonl": "captions.jsonl", "saved": "kept", "hub_like": "kept"}
    is_path = hasattr(data, "__fspath__")
    out = tmp_path / "out" / names.get(writer.__name__, data.name if is_path else "kept.json")
    given = {} if is_path else {"data": data, "image_root": root}
    if writer.__name__ in ("hub_like_streaming", "in_memory"):
        with pytest.raises(
            ValueError, match=r"which has no format to be written in. Write it to a file and score that"
        ):
            seecal.filter(tmp_path / "scores", out, min_delta=limit, **given)
        return
    seecal.filter(tmp_path / "scores", out, min_delta=limit, **given)
    kept = [row for row, (mean, _, _) in found.items() if mean >= limit]
    assert 0 < len(kept) < 4
    before = [row.record for row in LocatedRecords(data, image_root=folder).rows()]
    after = [row.record for row in LocatedRecords(out, image_root=folder).rows()]
    strip = [({**record, "id": ""}) for record in after]
    assert strip == [{**before[row], "id": ""} for row in kept]


def test_lines_stay_to_the_byte(tmp_path):
    sources.images_in(tmp_path / "data")
    lines = [
        json.dumps(row, ensure_ascii=number % 2 == 0, indent=None) + "  "
        for number, row in enumerate(sources.llava_rows(sources.SIMPLE))
    ]
    data = tmp_path / "data" / "data.jsonl"
    data.write_text("\ufeff" + "\n\n".join(lines), "utf8")
    score(data, tmp_path / "scores")
    seecal.filter(tmp_path / "scores", tmp_path / "kept.jsonl", min_delta=-1e9)
    assert (tmp_path / "kept.jsonl").read_text("utf-8-sig").splitlines() == lines


@pytest.mark.parametrize("note", ["\ud83d", ["\udc00é", "\\ud83d \\"], {"\ud83d\ud83d": "🦊"}])
def test_half_a_surrogate_pair_in_a_key_that_nothing_reads(tmp_path, note):
    rows = [{"id": f"r{number}", "note": note} for number in range(3)]
    files = {
        "data.json": json.dumps(rows),
        "lines.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }
    added = [{"weights": [1.0], "weight_ids": [5]}] * 2
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        for weights in (None, added):
            out, keep = tmp_path / f"out-{name}", np.array([True, False, True])
            write_back(tmp_path / name, out, keep, None if weights is None else iter(weights))
            content = out.read_text("utf8")
            found = json.loads(content) if name.endswith(".json") else [json.loads(one) for one in content.splitlines()]
            assert found == [row | (weights[0] if weights else {}) for row in (rows[0], rows[2])]


def test_several_parquet_files(tmp_path):
    score(sources.two_parquet_files(tmp_path), tmp_path / "scores")
    places = [(record.source, record.row) for record in read_scores(tmp_path / "scores")]
    assert places == [("a.parquet", 0), ("a.parquet", 1), ("b.parquet", 0), ("b.parquet", 1)]
    report = seecal.filter(tmp_path / "scores", tmp_path / "kept", top=0.5)
    assert report.kept == 2
    assert len(seecal.load_records(tmp_path / "kept")) == 2


def test_what_filter_refuses(scored, tmp_path):
    scores, data = scored
    out = tmp_path / "kept.json"
    for options, told in (
        ({}, "nothing to filter by. Set max_contradictory, min_delta or top"),
        ({"top": 1.5}, r"top=1.5: expected a share from 0 to 1"),
        ({"top": 0.5, "by": "weight"}, "by='weight': expected one of delta, gain"),
    ):
        with pytest.raises(ValueError, match=told):
            seecal.filter(scores, out, **options)
    with pytest.raises(ValueError, match=r"kept.csv: the data is .json, and is written back as that"):
        seecal.filter(scores, tmp_path / "kept.csv", top=0.5)
    with pytest.raises(FileNotFoundError, match=r"nowhere.json"):
        seecal.filter(scores, out, top=0.5, data=tmp_path / "nowhere.json")
    rows = json.loads(data.read_text("utf8"))
    other = sources.write_json(data.parent / "other.json", rows[:-1])
    with pytest.raises(ValueError, match=r"these are scores of another version of .*other.json"):
        seecal.filter(scores, out, top=0.5, data=other)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_tar_files_are_refused(tmp_path):
    folder = sources.images_in(tmp_path / "data")
    with tarfile.open(folder / "data.tar", "w") as tar:
        for number, row in enumerate(sources.llava_rows(sources.SIMPLE)):
            (folder / "row.json").write_text(json.dumps({"conversations": row["conversations"]}))
            tar.add(folder / "row.json", f"{number}.json")
            tar.add(folder / row["image"], f"{number}.png")
    score(folder / "data.tar", tmp_path / "scores")
    with pytest.raises(ValueError, match=r"data.tar: a .tar shard is not written back. Write its records as JSONL"):
        seecal.filter(tmp_path / "scores", tmp_path / "kept.tar", top=0.5)
    assert not (tmp_path / "kept.tar").exists()


TABLES = {
    "semicolons": (
        "d.csv",
        'file_name;text\r\nred.png;"Red, big; square"\r\nblue.png;"It is ""blue"""\r\n\r\nred.png;C',
    ),
    "tabs": ("d.csv", 'file_name\ttext\nred.png\t"A ""red"" one"\nblue.png\tB, b\nred.png\tC; c\n'),
    "a quoted line break": (
        "d.csv",
        'file_name;text\nred.png;"A square;\nall red, big"\nblue.png;B\nred.png;"C\r\n\r\nc"\n',
    ),
    "tsv": ("d.tsv", 'file_name\ttext\nred.png\t"A\tred"\nblue.png\tB, b\nred.png\tC; c\n'),
    "commas": ("d.csv", 'file_name,text\nred.png,"A, ""a"""\nblue.png,"B"\nred.png,"C\n"\n'),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


def read_again(path, encoding):
    """(the text, the captions that load_records finds in it)."""
    captions = [record["messages"][1]["content"][0]["text"] for record in seecal.load_records(path)]
    with path.open(encoding=encoding, newline="") as file:
        return file.read(), captions


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_stays_to_the_letter(tmp_path, name, encoding):
    sources.images_in(tmp_path)
    file, text = TABLES[name]
    data, out = tmp_path / file, tmp_path / f"out-{file}"
    data.write_bytes(text.encode(encoding))
    _, captions = read_again(data, encoding)
    assert len(captions) == 3
    write_back(data, out, np.array([True, True, True]))
    assert read_again(out, encoding) == (text.replace("\r\n\r\nred", "\r\nred").rstrip("\n") + "\n", captions)
    assert out.read_bytes()[:3] == data.read_bytes()[:3], "the mark at the start"
    write_back(data, out, np.array([False, True, False]))
    assert read_again(out, encoding)[1] == captions[1:2]


def test_unreadable_rows_of_a_table_do_not_shift_the_others(tmp_path):
    sources.images_in(tmp_path)
    data, out = tmp_path / "d.csv", tmp_path / "out.csv"
    data.write_text('file_name;text\nred.png;A\nred.png;"B"b\nred.png;C;c\nred.png;D\n')
    write_back(data, out, np.array([True, False, False, True]))
    assert out.read_text() == "file_name;text\nred.png;A\nred.png;D\n"
    write_back(data, out, np.array([False, True, True, False]))
    assert out.read_text() == "file_name;text\nred.png;C;c\n", "what is lost is only shown where it can be read"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["d.jsonl", "lines.json", "list.json"])
def test_json_stays_in_its_encoding(tmp_path, name, encoding):
    chat = sources.messages([("q", "ä")])
    notes = ("\ud83d", "", "€")  # half a surrogate pair: no text, but JSON
    lines = [json.dumps({"id": f"é{number}", "note": note, "messages": chat}) for number, note in enumerate(notes)]
    text = "[" + ",".join(lines) + "]" if name == "list.json" else "\r\n".join(lines)
    (tmp_path / name).write_bytes(text.encode(encoding))
    out, weights = tmp_path / f"out-{name}", [{"weights": [1.0], "weight_ids": [7]}] * 2
    for added in (None, iter(weights)):
        write_back(tmp_path / name, out, np.array([True, False, True]), added)
        assert seecal.load_records(out)["id"] == ["é0", "é2"]
        found = out.read_bytes().decode(encoding)
        assert found.startswith("[" if name == "list.json" else '{"id"')
    assert '"weights": [1.0]' in found


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl", "d.json", "d.parquet"])
@pytest.mark.parametrize(
    ("rows", "words"), [(2, "has more than the 2 records"), (4, "has 3 records, but 4 were scored")]
)
def test_another_number_of_rows_is_an_error(tmp_path, name, rows, words):
    folder = sources.images_in(tmp_path / "data")
    chats = [{"file_name": "red.png", "text": str(number)} for number in range(3)]
    data = folder / name
    if name == "d.csv":
        data.write_text("file_name,text\n" + "red.png,A\n" * 3)
    elif name == "d.parquet":
        datasets.Dataset.from_list(chats).to_parquet(data)
    else:
        data.write_text(json.dumps(chats) if name == "d.json" else "\n".join(map(json.dumps, chats)))
    with pytest.raises(ValueError, match=rf"{name}: it {words}.* Score it again"):
        write_back(data, tmp_path / name, np.ones(rows, dtype=bool))
    assert not (tmp_path / name).exists()
