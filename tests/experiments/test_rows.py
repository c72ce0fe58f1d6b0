"""Rows are whole or not there, and none is there twice."""

import json

import pytest
from experiments.rows import Rows, rounded
from experiments.token_kinds import CONTRASTS, PLANS, run

from experiments import swapped_captions, token_kinds


def test_rows_are_kept(tmp_path):
    rows = Rows("a", tmp_path)
    assert not rows.has(model="m")
    rows.add({"model": "m", **rounded((0.123456, float("nan"), 1.0))})
    assert Rows("a", tmp_path).all == [{"model": "m", "estimate": 0.1235, "low": None, "high": 1.0}]
    assert Rows("a", tmp_path).has(model="m")
    assert not Rows("a", tmp_path).has(model="m", low=1)


def test_a_row_is_a_line_and_what_is_there_stays(tmp_path):
    for number in range(3):
        before = (tmp_path / "a.jsonl").read_bytes() if number else b""
        Rows("a", tmp_path).add({"number": number, "said": "two\nlines, Δ"})
        after = (tmp_path / "a.jsonl").read_bytes()
        assert after.startswith(before)
        assert after.endswith(b"\n")
        assert after.count(b"\n") == number + 1
    assert Rows("a", tmp_path).all == [{"number": number, "said": "two\nlines, Δ"} for number in range(3)]


@pytest.mark.parametrize("first", [{}, {"first": "one"}])
def test_a_row_cut_anywhere_is_no_row_and_the_next_takes_its_place(tmp_path, first):
    """Also a row that lacks its last byte, the end of the line, and one cut inside a letter."""
    path, cut = tmp_path / "a.jsonl", json.dumps({"cut": "Δ"}, ensure_ascii=False).encode() + b"\n"
    kept = [first] if first else []
    for length in range(len(cut)):
        path.unlink(missing_ok=True)
        for row in kept:
            Rows("a", tmp_path).add(row)
        with path.open("ab") as file:
            file.write(cut[:length])
        rows = Rows("a", tmp_path)
        assert rows.all == kept
        rows.add({"next": 1})
        assert Rows("a", tmp_path).all == rows.all == [*kept, {"next": 1}]
        assert path.read_bytes().count(b"\n") == len(rows.all)


@pytest.mark.parametrize("line", [b'{"cut": ', b"[1]", b"1"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*take the line out"):
        Rows("a", tmp_path)


# ---- Runs ----


class StoppedError(Exception):
    """In the place of Ctrl-C."""


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A demo's folder of which only the recipe is read; every measurement is counted and none is made."""
    (tmp_path / "recipe.yaml").write_text("stages: [{max_steps: 1}, {max_steps: 2}]", "utf8")
    made = []

    def measured(model, known, contrast, bf16):
        made.append((model.name, contrast))
        return {}, "digest"

    monkeypatch.setattr(token_kinds, "cases", lambda *given: [])
    monkeypatch.setattr(token_kinds, "measured", measured)
    monkeypatch.setattr(token_kinds, "endpoints", lambda found: [{"endpoint": "one"}])
    return tmp_path, made


def test_a_second_run_makes_nothing(demo):
    folder, made = demo
    run(folder, None, Rows("token_kinds", folder))
    assert len(made) == len(set(made)) == len(PLANS) == 2 * len(CONTRASTS)
    before = (folder / "token_kinds.jsonl").read_bytes()
    run(folder, None, Rows("token_kinds", folder))
    assert len(made) == len(PLANS)
    assert (folder / "token_kinds.jsonl").read_bytes() == before
    rows = Rows("token_kinds", folder).all
    assert {(row["model"], row["contrast"]) for row in rows} == set(PLANS)
    assert all(row["steps"] == [1, 2] for row in rows)


def test_a_run_that_was_stopped_goes_on(demo, monkeypatch):
    folder, made = demo
    whole, stops = token_kinds.endpoints, iter([False, False, True])

    def stopped(found):
        if next(stops):
            raise StoppedError
        return whole(found)

    monkeypatch.setattr(token_kinds, "endpoints", stopped)
    with pytest.raises(StoppedError):
        run(folder, None, Rows("token_kinds", folder))
    assert [(row["model"], row["contrast"]) for row in Rows("token_kinds", folder).all] == PLANS[:2]
    with (folder / "token_kinds.jsonl").open("ab") as file:
        file.write(b'{"experiment": "token_k')  # a kill while the third was written
    monkeypatch.setattr(token_kinds, "endpoints", whole)
    run(folder, None, Rows("token_kinds", folder))
    assert len(made) == len(PLANS) + 1
    assert [(row["model"], row["contrast"]) for row in Rows("token_kinds", folder).all] == PLANS


def test_rows_of_one_model_are_not_doubled_after_a_stop(tmp_path, monkeypatch):
    """Swapped captions has several rows a model, and a stop may fall between them."""
    of_model = [
        {"records": 0, "endpoint": "auroc", "rule": rule, "estimate": 0.5}
        for rule in ("delta", "gain", "contradictory")
    ]
    monkeypatch.setattr(swapped_captions, "described", lambda demo, limit: [])
    monkeypatch.setattr(
        swapped_captions, "measured", lambda name, model, known: [{"model": name, **row} for row in of_model]
    )
    Rows("a", tmp_path).add({"model": next(iter(swapped_captions.MODELS)), **of_model[0]})
    for _ in range(2):
        swapped_captions.run(tmp_path, None, Rows("a", tmp_path))
        assert len(Rows("a", tmp_path).all) == len(of_model) * len(swapped_captions.MODELS)
