"""What each backend is given of logged tokens: fakes that note it, and the real ones where they are installed."""

import html
import math
from types import SimpleNamespace

import pytest
from transformers.integrations import TensorBoardCallback, TrackioCallback

from seecal.core.coloured import ColouredToken, in_markdown, markdown_table
from seecal.trainer.token_backends import ANSWER, DELTA, TABLE, LoggedTokens, backends_of
from tests.support.fake_wandb import Recorder, fake_wandb, give


@pytest.fixture
def wandb(monkeypatch):
    fake = fake_wandb()
    give(monkeypatch, "wandb", fake)
    return fake


HOSTILE = [
    ColouredToken("<script>", 9.0, True),
    ColouredToken(" a|b", -2.4, True),
    ColouredToken("*x*\n", 0.2, True),
    ColouredToken("[y](z)`", 1.0, False),
    ColouredToken("\u202e", math.nan, True),
]


def test_a_table_of_markdown_shows_texts_as_they_are():
    table = markdown_table(HOSTILE[:4]).splitlines()
    assert table[0] == "| token | Δ | |"
    assert table[2:] == [
        "| &#60;script&#62; | +9.00 | 🟪🟪🟪🟪🟪 |",
        "| ␣a&#124;b | -2.40 | 🟧🟧 |",
        "| &#42;x&#42;↵ | +0.20 |  |",
        "| &#91;y&#93;&#40;z&#41;&#96; | – | no image before it |",
    ]
    assert in_markdown("  ") == "␣␣"
    plugin = pytest.importorskip("tensorboard.plugin_util")
    page = plugin.markdown_to_safe_html("\n".join(table))
    assert "<script>" in html.unescape(page)
    assert "<script>" not in page
    assert "<em>" not in page
    assert page.count("<td") == 12


def test_what_is_not_finite_is_in_the_text_and_not_in_the_histogram(wandb):
    logged = LoggedTokens(3, "record 'a'", [HOSTILE])
    backends_of([Recorder()])["wandb"](logged)
    (log,) = wandb.logs
    assert log[DELTA][1].tolist() == [9.0, -2.4, 0.2]
    assert "⟨U+202E⟩" in log[ANSWER][1]
    wandb.logs.clear()
    backends_of([Recorder()])["wandb"](LoggedTokens(3, "record 'a'", [HOSTILE[3:]]))
    assert set(wandb.logs[0]) == {ANSWER, TABLE, "train/global_step"}, "nothing to make a histogram of"


def bare(kind):
    return object.__new__(kind)


@pytest.mark.parametrize("kinds", [("Html", "Table", "Histogram"), ("Table",)])
def test_trackio_gets_what_its_version_has(kinds, monkeypatch):
    logs = []
    made = {kind: lambda *args, kind=kind, **kwargs: (kind, *args, *kwargs.values()) for kind in kinds}
    give(monkeypatch, "trackio", SimpleNamespace(log=logs.append, **made))
    backends_of([bare(TrackioCallback)])["trackio"](LoggedTokens(3, "record 'a'", [HOSTILE[:2]]))
    (log,) = logs
    assert log.pop("train/global_step") == 3
    assert {ANSWER: "Html", TABLE: "Table", DELTA: "Histogram"}.items() >= {
        tag: one[0] for tag, one in log.items()
    }.items()
    assert sorted(one[0] for one in log.values()) == sorted(kinds)
    assert log[TABLE][2][0] == ["&#60;script&#62;", 9.0, True]


def test_tensorboards_writer_is_the_callbacks_own():
    callback = bare(TensorBoardCallback)
    callback.tb_writer = None  # as on any rank but the first
    calls, log = [], backends_of([callback])["tensorboard"]
    log(LoggedTokens(0, "record 'a'", [HOSTILE]))
    callback.tb_writer = SimpleNamespace(
        add_text=lambda *args: calls.append(("text", *args)),
        add_histogram=lambda *args: calls.append(("histogram", *args)),
        flush=lambda: None,
    )
    log(LoggedTokens(5, "record 'a'", [HOSTILE]))
    assert [(one[0], one[1], one[3]) for one in calls] == [("text", ANSWER, 5), ("histogram", DELTA, 5)]


def test_the_real_wandb_takes_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="seecal", mode="offline", dir=str(tmp_path))
    backends_of([Recorder()])["wandb"](LoggedTokens(3, "record 'a'", [HOSTILE]))
    run.finish()
    (page,) = tmp_path.rglob("*.html")
    assert "&lt;script&gt;" in page.read_text("utf8")
    assert len([*tmp_path.rglob("*.table.json")]) == 1


def test_the_real_trackio_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    trackio.init(project="seecal", name="one", auto_log_gpu=False)
    backends_of([bare(TrackioCallback)])["trackio"](LoggedTokens(3, "record 'a'", [HOSTILE]))
    trackio.finish()
    (page,) = tmp_path.rglob("*.html")
    assert "&lt;script&gt;" in page.read_text("utf8")
