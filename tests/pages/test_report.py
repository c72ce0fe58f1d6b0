"""What a report page holds, and what it refuses; what a browser makes of it is tested in test_report_browser.py."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest

import seecal
from seecal.pages.report_data import questions_of
from seecal.pages.thumbnails import even, extremes
from tests.support.scored import llava_file, scored_folder
from tests.support.tiny import tiny_image

HOSTILE = [
    "</script><script>window.hacked = 1</script> red",
    "<img src=x onerror=window.hacked=1> green",
    '=HYPERLINK("http://example.com") blue',
    "a \u202ereversed\u202c yellow \u2028 line",
    "{{ 7 * 7 }} {% raw %} é 👩‍🚀 你好 red",
]


def made(folder, answers=("a red cat", "a blue dog on 2 mats.", "yellow"), **options):
    data = llava_file(folder / "data", list(answers), **options)
    return data, scored_folder(data, folder / "scores")


class Outside(HTMLParser):
    """Addresses that a browser would fetch, and the text of script elements by their id."""

    def __init__(self):
        super().__init__()
        self.addresses, self.scripts, self._id = [], {}, None

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [
            found[name] for name in ("src", "href", "srcset", "data", "action", "xlink:href") if name in found
        ]
        self._id = found.get("id") if tag == "script" else None

    def handle_data(self, data):
        if self._id:
            self.scripts[self._id] = self.scripts.get(self._id, "") + data


def parsed(path):
    parser = Outside()
    parser.feed(path.read_text("utf8"))
    return parser


def test_the_page_has_every_record_and_leads_nowhere(tmp_path):
    _, scores = made(tmp_path)
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.records, report.images, report.without_room, report.notes) == (3, 3, 0, [])
    assert report.bytes == (tmp_path / "page.html").stat().st_size
    page = parsed(tmp_path / "page.html")
    assert [one for one in page.addresses if not one.startswith("#")] == []
    index = json.loads(page.scripts["index"])
    assert index["answers"] == [["a red cat"], ["a blue dog on 2 mats."], ["yellow"]]
    assert index["questions"] == [["🖼\nWhat is it?"]] * 3 or index["questions"] == [["🖼 What is it?"]] * 3
    turns, lengths, names, inside, delta, weight, logit = json.loads(page.scripts["chunk-0"])[1]
    assert lengths == [1, 5, 4, 3, 2, 6, 0]
    assert names == {"6": "<|end|>"}
    assert inside == []
    assert len(turns) == len(delta) == len(weight) == len(logit) == 7
    text = (tmp_path / "page.html").read_text("utf8")
    assert "Content-Security-Policy" in text
    for kind in ("other words", "function words", "numbers", "end of turn"):
        assert kind in text
    assert text.count("<svg") == 4, "by kind and by source, for light and dark"


def test_numbers_are_those_of_the_scores(tmp_path):
    data = llava_file(tmp_path / "data", ["a red cat", ["one", "two three"]])
    scores = scored_folder(
        data, tmp_path / "scores", delta_of=lambda row, count: [(-2.5, 0.25, 7.0, 1.0)[i % 4] for i in range(count)]
    )
    seecal.report(scores, out=tmp_path / "page.html")
    page = parsed(tmp_path / "page.html")
    index = json.loads(page.scripts["index"])
    assert index["mean"][0] == pytest.approx((-2.5 + 0.25 + 7 + 1) / 4, abs=1e-3)
    assert index["least"] == [-2.5, -2.5]
    assert index["against"] == [0.25, 0.4]
    assert json.loads(page.scripts["chunk-0"])[0][4] == [-250, 25, 700, 100]
    assert index["answers"][1] == ["one", "two three"]
    settings = json.loads(page.scripts["settings"])
    assert [tuple(entry) for entry in settings["against"][0]] == [(0, 0, -2.5), (1, 0, -2.5), (1, 2, -2.5)]


def test_text_of_the_data_stays_text(tmp_path):
    _, scores = made(tmp_path, HOSTILE, ids=["<b>1</b>", "2", "3", "4", "5"])
    seecal.report(scores, out=tmp_path / "page.html")
    page = parsed(tmp_path / "page.html")
    assert [answers[0] for answers in json.loads(page.scripts["index"])["answers"]] == HOSTILE
    text = (tmp_path / "page.html").read_text("utf8")
    assert "<script>window.hacked" not in text
    assert "<img src=x" not in text
    assert "\u2028" not in text


def test_a_budget_leaves_images_out_and_says_so(tmp_path):
    _, scores = made(tmp_path, [f"word{number}" for number in range(40)])
    whole = seecal.report(scores, out=tmp_path / "whole.html")
    some = seecal.report(scores, out=tmp_path / "some.html", budget_mb=0.005)
    assert whole.images == 40
    assert 0 < some.images < 40
    assert some.images + some.without_room == 40
    assert f"{some.without_room} of 40 records are shown without their image" in (tmp_path / "some.html").read_text(
        "utf8"
    )
    assert len(json.loads(parsed(tmp_path / "some.html").scripts["thumbnails"])) == some.images
    none = seecal.report(scores, out=tmp_path / "none.html", budget_mb=0)
    assert (none.images, none.without_room) == (0, 40)


def test_extremes_come_first_and_then_an_even_sample():
    order = list(range(1000))
    found = extremes([order[::-1], order])
    assert found[:4] == [999, 0, 998, 1]
    assert sorted(found) == [*range(60), *range(940, 1000)]
    assert sorted(extremes([[5, 6, 7]])) == [5, 6, 7]
    rest = even([number for number in order if number not in found], 200)
    assert len(set(rest)) == 200
    gaps = [after - before for before, after in itertools.pairwise(rest)]
    assert set(gaps) == {4, 5}, "two hundred of 880 are evenly spread"
    assert even([1, 2], 9) == [1, 2]
    assert even([], 9) == even([1], 0) == []


def test_damaged_images_do_not_stop_it(tmp_path):
    data, scores = made(tmp_path, ["a"] * 8)
    for colour in ("red", "blue"):  # their headers are whole
        whole = (data.parent / f"{colour}.png").read_bytes()
        (data.parent / f"{colour}.png").write_bytes(whole[: len(whole) // 2])
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.images, len(report.damaged), report.without_room) == (4, 4, 0)
    assert "4 of 8 records have an image that cannot be opened, the first: data.json: record " in report.notes[0]
    assert "blue.png" in "".join(report.damaged)


def test_data_that_is_gone_or_has_moved(tmp_path):
    data, scores = made(tmp_path)
    data.parent.rename(tmp_path / "moved")
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert report.images == 0
    assert report.notes == [f"The data is no longer at {data}: name it with --data to see questions and images."]
    assert seecal.report(scores, out=tmp_path / "page.html", data=tmp_path / "moved" / "data.json").images == 3
    with pytest.raises(FileNotFoundError):
        seecal.report(scores, out=tmp_path / "page.html", data=tmp_path / "nowhere.json")


def test_two_models(tmp_path):
    data, scores = made(tmp_path)
    other = scored_folder(data, tmp_path / "other", seed=1, shift=2.0, model="b/model")
    seecal.report(scores, other, out=tmp_path / "page.html")
    page = parsed(tmp_path / "page.html")
    index = json.loads(page.scripts["index"])
    assert len(index["mean2"]) == 3
    assert len(json.loads(page.scripts["chunk-0"])[0]) == 10
    text = (tmp_path / "page.html").read_text("utf8")
    assert "a/model" in text
    assert "b/model" in text
    assert text.count("<svg") == 8


@pytest.mark.parametrize("skipped", [["r1"], ["r0", "r5"], ["r6"], []])
def test_shards_of_other_sizes_are_compared(tmp_path, skipped):
    """The rows without scores stand behind those of their shard."""
    data = llava_file(tmp_path / "data", ["a red cat"] * 7)
    small, large = (
        scored_folder(data, tmp_path / f"by{size}", skipped=skipped, per_shard=size, seed=size) for size in (2, 5)
    )
    report = seecal.report(small, large, out=tmp_path / "page.html")
    assert (report.records, report.skipped) == (7 - len(skipped), len(skipped))
    index = json.loads(parsed(tmp_path / "page.html").scripts["index"])
    alone = [
        json.loads(parsed(seecal.report(side, out=tmp_path / "one.html").path).scripts["index"])
        for side in (small, large)
    ]
    assert (index["mean"], index["mean2"]) == (alone[0]["mean"], alone[1]["mean"])
    for others in (["r2"], ["r1", "r6"]):
        fewer = scored_folder(data, tmp_path / "-".join(others), skipped=others, per_shard=5)
        with pytest.raises(ValueError, match=r"r.: other records were left out than in .*by2\. Score both alike"):
            seecal.report(small, fewer, out=tmp_path / "page.html")


@pytest.mark.parametrize(
    ("said", "question"),
    [
        ([{"role": "user", "content": "Which?", "name": "Bob"}], "Which?"),
        ([{"role": "user", "content": "<image>Which?", "name": "Bob", "mood": {"a": [1]}}], "🖼 Which?"),
        (
            [{"role": "system", "content": "Be kind.", "name": "x"}, {"role": "user", "content": "Why?"}],
            "Be kind.\nWhy?",
        ),
    ],
)
def test_keys_of_messages_are_not_what_was_said(tmp_path, said, question):
    images = [tiny_image("red")] if "🖼" in question else []
    row = {"messages": [*said, {"role": "assistant", "content": "a", "name": "Eve"}], "images": images}
    (record,) = seecal.load_records([row])
    assert questions_of(record["messages"], [0]) == [question]


def test_what_cannot_be_compared(tmp_path):
    data, scores = made(tmp_path)
    _, elsewhere = made(tmp_path / "b", ["a green cat"])
    with pytest.raises(ValueError, match=r"scores of other data .*Compare two models on the same data"):
        seecal.report(scores, elsewhere, out=tmp_path / "page.html")
    fewer = scored_folder(data, tmp_path / "fewer", skipped=["r1"])
    with pytest.raises(ValueError, match=r"other records were left out"):
        seecal.report(scores, fewer, out=tmp_path / "page.html")
    other = scored_folder(data, tmp_path / "other")
    import pyarrow.compute
    import pyarrow.parquet

    (shard,) = other.glob("*.parquet")
    table = pyarrow.parquet.read_table(shard)
    ids = pyarrow.compute.add(table["token_id"], 1)
    pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index("token_id"), "token_id", ids), shard)
    with pytest.raises(ValueError, match=r"record 'r0' has other label tokens"):
        seecal.report(scores, other, out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_one_clear_line_each(tmp_path, monkeypatch):
    data, scores = made(tmp_path)
    with pytest.raises(ValueError, match=r"so these are no scores. Make them with seecal score"):
        seecal.report(tmp_path / "data", out=tmp_path / "page.html")
    (shard,) = scores.glob("*.parquet")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"not a whole shard of scores"):
        seecal.report(scores, out=tmp_path / "page.html")
    shard.unlink()
    with pytest.raises(ValueError, match=r"1 of 1 shards are missing"):
        seecal.report(scores, out=tmp_path / "page.html")
    shard.write_bytes(whole)
    data.write_text(data.read_text("utf8").replace("a red cat", "a red dog"), "utf8")
    with pytest.raises(ValueError, match=r"scores of another version of .*data.json"):
        seecal.report(scores, out=tmp_path / "page.html")
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'seecal[report]'")):
        seecal.report(scores, out=tmp_path / "page.html")


def test_a_set_without_images(tmp_path):
    _, scores = made(tmp_path, image=False)
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert report.notes == ["No token has an image before it, so Δ is 0 everywhere and nothing is coloured."]
    index = json.loads(parsed(tmp_path / "page.html").scripts["index"])
    assert index["mean"] == [None] * 3


def test_rows_without_scores_are_counted(tmp_path):
    data = llava_file(tmp_path / "data", ["a", "b", "c"])
    report = seecal.report(scored_folder(data, tmp_path / "scores", skipped=["r1"]), out=tmp_path / "page.html")
    assert (report.records, report.skipped) == (2, 1)
    assert report.notes == ["1 row of the data without scores."]


def words_of(text, title):
    """word → its figures, of a list on the page."""
    (listed,) = re.findall(rf"<h3>{title}</h3><ol class=\"words\">(.*?)</ol>", text, re.S)
    return dict(re.findall(r"data-word=\"(.*?)\".*?<small>(.*?)</small>", listed))


def test_both_models_words_and_what_changed(tmp_path):
    """A sees cats and B sees dogs; of the words of both, each list has its own figures."""
    data = llava_file(tmp_path / "data", ["cat dog sky"] * 3)
    a = scored_folder(data, tmp_path / "a", delta_of=lambda row, count: [4.0, -2.0, 1.0, 0.0])
    b = scored_folder(data, tmp_path / "b", delta_of=lambda row, count: [1.0, 3.0, 1.0, 0.0], model="b/model", seed=1)
    seecal.report(a, b, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf8")
    letter = '<b class="letter">{}</b> '
    assert list(words_of(text, letter.format("A") + "Most visual words")) == ["cat", "sky", "dog"]
    assert list(words_of(text, letter.format("B") + "Most visual words")) == ["dog", "cat", "sky"]
    assert list(words_of(text, letter.format("B") + "Least visual words")) == ["sky", "cat", "dog"]
    assert words_of(text, letter.format("B − A") + "Words that rose most") == {"dog": "+5.00: −2.00 → +3.00 · 3×"}
    assert words_of(text, letter.format("B − A") + "Words that fell most") == {"cat": "−3.00: +4.00 → +1.00 · 3×"}
    against = json.loads(parsed(tmp_path / "page.html").scripts["settings"])["against"]
    assert [len(of_side) for of_side in against] == [3, 0]
    seecal.report(b, a, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf8")
    assert list(words_of(text, letter.format("B − A") + "Words that rose most")) == ["cat"]
    seecal.report(b, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf8")
    assert list(words_of(text, "Most visual words")) == ["dog", "cat", "sky"]
    assert "B − A" not in text.split("<main>")[1].split("<script")[0]


def axes_of(text):
    """What the pictures of a page say of their axes upwards, in order."""
    return re.findall(r"Y-axis titled 'share of tokens' for a linear scale with values from ([^\"]*?)\"", text)


@pytest.mark.parametrize("flat_first", [True, False], ids=["A is flat", "B is flat"])
def test_pictures_of_two_models_have_one_scale(tmp_path, flat_first):
    data = llava_file(tmp_path / "data", ["one two three four"] * 20)
    flat = scored_folder(data, tmp_path / "flat", shift=2.0)
    steep = scored_folder(data, tmp_path / "steep", delta_of=lambda row, count: [1.1] * count, seed=1)
    axes = []
    for sides in ((flat,), (steep,), (flat, steep) if flat_first else (steep, flat)):
        seecal.report(*sides, out=tmp_path / "page.html")
        axes.append(axes_of((tmp_path / "page.html").read_text("utf8")))
    assert [len(one) for one in axes] == [4, 4, 8]
    assert set(axes[1]) == set(axes[2]) == {"0% to 100%"}
    assert set(axes[0]) != set(axes[1]), "alone, a flat one has a scale of its own"
