"""Answers are in the file as they come, and only their own model's are taken again."""

import json
from types import SimpleNamespace

import pytest

from seecal.evaluation.kept_answers import KeptAnswers, state_of
from seecal.evaluation.task_requests import answered

ABOUT = {"model": "a", "versions": ("5", "2")}


def test_what_was_put_in_is_there_again(tmp_path):
    kept = KeptAnswers(tmp_path / "a.jsonl", ABOUT)
    kept["q"] = "two\nlines"
    kept["r"] = "ü"
    assert KeptAnswers(tmp_path / "a.jsonl", ABOUT) == {"q": "two\nlines", "r": "ü"}


@pytest.mark.parametrize("lost", [1, 5, 9])
def test_a_line_that_was_cut_off_is_asked_again(tmp_path, lost):
    path = tmp_path / "a.jsonl"
    kept = KeptAnswers(path, ABOUT)
    kept["q"], kept["r"] = "one", "another"
    path.write_bytes(path.read_bytes()[: -1 - lost])
    again = KeptAnswers(path, ABOUT)
    assert again == {"q": "one"}
    again["s"] = "three"
    assert KeptAnswers(path, ABOUT) == {"q": "one", "s": "three"}


@pytest.mark.parametrize("there", ["", "not JSON\n", '{"model": "b"}\n["q", "of b"]\n'])
def test_another_models_answers_are_not_taken(tmp_path, there):
    (tmp_path / "a.jsonl").write_text(there)
    assert KeptAnswers(tmp_path / "a.jsonl", ABOUT) == {}
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [
        {"model": "a", "versions": ["5", "2"]}
    ]


def test_a_changed_model_is_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12")
    before = state_of(str(tmp_path))
    assert before == state_of(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert state_of(str(tmp_path)) != before
    assert state_of("owner/name") == []


def requests_of(settings, count=3):
    def messages(document):
        return [{"role": "user", "content": document}]

    return [SimpleNamespace(args=("a" * at, messages, settings, at, "t", "test")) for at in range(count)]


def test_only_what_is_not_kept_is_asked_for():
    asked, kept, told = [], {}, []

    def ask(records, settings):
        asked.extend(record["id"] for record in records)
        return [record["id"] for record in records]

    documents = {"t": {"test": ["x", "y", "z"]}}
    answered(requests_of({}, 2), documents, ask, batch_size=2, kept=kept)
    found = answered(requests_of({}), documents, ask, batch_size=2, kept=kept, tell=told.append)
    assert found == ["t, doc_id 0", "t, doc_id 1", "t, doc_id 2"]
    assert asked == ["t, doc_id 1", "t, doc_id 0", "t, doc_id 2"]
    assert told == [2, 1]
    for other in ({"max_new_tokens": 3}, {"until": ["."]}, {"temperature": 0.5}):
        asked.clear()
        answered(requests_of(other), documents, ask, batch_size=2, kept=kept)
        assert len(asked) == 3, other
    assert not any("'do_sample': True" in key for key in kept)
