"""seecal.filter(tokens=True): weights of 0 that training takes, exactly, or refuses."""

import json

import numpy as np
import pytest
import torch
from datasets import IterableDataset

import seecal
from seecal import CALOptions, VisionCollator
from seecal.scoring import Skipped, read_scores
from seecal.scoring.token_rules import TokenRule
from tests.scoring.test_join import config
from tests.scoring.test_score import write_llava
from tests.scoring.test_selection import log_of, score
from tests.support import sources
from tests.support.tiny import MARKED_TEMPLATE, tiny_dataset, tiny_llava, tiny_llava_processor, tiny_tokenizer

EMOJI = [*sources.turn("<image>\nWhat? 🐈", "It is 🐈‍⬛ red."), *sources.turn("a b", " c é 红色 🙂🙂 ")]


def other_processor():
    """Another template (with generation blocks) and another tokenizer: a merge less, so other tokens."""
    processor = tiny_llava_processor()
    text = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    text["model"]["merges"] = text["model"]["merges"][:-20]
    tokenizer = tiny_tokenizer(MARKED_TEMPLATE)
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(text))
    processor.tokenizer, processor.chat_template = tokenizer, MARKED_TEMPLATE
    return processor


PROCESSORS = {"plain": tiny_llava_processor, "other": other_processor}


def scored(scores):
    return [record for record in read_scores(scores) if not isinstance(record, Skipped)]


def below_of(scores):
    """A Δ that about a third of the tokens with an image are below."""
    found = sorted(
        float(delta) for record in scored(scores) for delta in record.columns["delta"][record.columns["has_contrast"]]
    )
    return found[len(found) // 3]


def by_hand(scores, below):
    """row -> [N] of 1 and 0, token by token."""
    return {
        record.row: [
            float(not (seen and delta < below))
            for delta, seen in zip(record.columns["delta"].tolist(), record.columns["has_contrast"], strict=True)
        ]
        for record in scored(scores)
    }


def plain_loss(model, batch, weights):
    """Σ w·CE / Σ w over the label tokens, from the model's own logits."""
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "token_weights")}
        logits = model(**inputs).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    w = torch.tensor([weight for row in weights for weight in row], dtype=torch.double)
    return float((each[labels.flatten() != -100] * w).sum() / w.sum())


@pytest.mark.parametrize("name", PROCESSORS)
def test_training_on_it_is_weighting_by_hand(tmp_path, name):
    processor = PROCESSORS[name]()
    data = write_llava(tmp_path / "data", 10, r1={"conversations": EMOJI})
    score(data, tmp_path / "scores", processor=processor)
    below = below_of(tmp_path / "scores")
    expected = by_hand(tmp_path / "scores", below)
    out = tmp_path / "data" / "kept.json"
    report = seecal.filter(tmp_path / "scores", out, tokens=True, below=below)
    whole = {row: weights for row, weights in expected.items() if any(weights)}
    assert report.kept == len(whole)
    assert report.reasons == ({"all its tokens": 10 - len(whole)} if len(whole) < 10 else {})
    assert report.tokens == sum(map(len, whole.values()))
    assert 0 < report.tokens_removed == sum(weights.count(0.0) for weights in whole.values())
    written = {row["id"]: row["weights"] for row in json.loads(out.read_text("utf8"))}
    assert written == {f"r{row}": weights for row, weights in whole.items()}
    records = seecal.load_records(out)
    batch = dict(VisionCollator(processor)([records[index] for index in range(len(records))]))
    model = tiny_llava()
    expected_loss = plain_loss(model.eval(), batch, whole.values())
    trained = seecal.enable_cal(model.train(), CALOptions(normalize="micro_batch"))(**batch)
    assert trained.loss.item() == pytest.approx(expected_loss, abs=1e-5)
    ones = plain_loss(model.eval(), batch, [[1.0] * len(weights) for weights in whole.values()])
    assert abs(ones - expected_loss) > 1e-4, "the weights matter"


def test_the_trainer_takes_it_and_another_tokenizer_is_refused(tmp_path):
    data = write_llava(tmp_path / "data", 8, r1={"conversations": EMOJI})
    score(data, tmp_path / "scores")
    out = tmp_path / "data" / "kept.json"
    seecal.filter(tmp_path / "scores", out, tokens=True, below=below_of(tmp_path / "scores"))
    records = seecal.load_records(out)
    losses = []
    for dropped in ([], ["weights", "weight_ids"]):
        trainer = seecal.CALTrainer(
            tiny_llava(),
            config(tmp_path / "out", weighting="uniform"),
            train_dataset=records.remove_columns(dropped),
            processing_class=tiny_llava_processor(),
        )
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert abs(losses[0] - losses[1]) > 1e-4
    with pytest.raises(ValueError, match=r"weights (for \d+ label tokens|were measured for other tokens)"):
        VisionCollator(other_processor())([records[index] for index in range(len(records))])
    same_length = [{**records[0], "weight_ids": [index + 1 for index in records[0]["weight_ids"]]}]
    with pytest.raises(ValueError, match="its weights were measured for other tokens than its labels"):
        VisionCollator(tiny_llava_processor())(same_length)


def test_text_only_records_stay_whole_and_the_log_counts(tmp_path):
    data = write_llava(tmp_path / "data", 10)
    score(data, tmp_path / "scores")
    below = below_of(tmp_path / "scores")
    out = tmp_path / "kept.json"
    seecal.filter(tmp_path / "scores", out, tokens=True, below=below)
    rows = {row["id"]: row for row in json.loads(out.read_text("utf8"))}
    text_only = [row for row in rows.values() if "image" not in row]
    assert len(text_only) == 2
    assert all(set(row["weights"]) == {1.0} for row in text_only)
    lost = {line["row"]: (line["value"], line["of"]) for line in log_of(out) if line["why"] == "tokens"}
    expected = by_hand(tmp_path / "scores", below)
    assert lost == {
        row: (weights.count(0.0), len(weights)) for row, weights in expected.items() if 0.0 in weights and any(weights)
    }


def test_by_gain_it_is_vig(tmp_path):
    """The weights are those that weighting="vig" gives with the threshold that top finds."""
    data = write_llava(tmp_path / "data", 16)
    score(data, tmp_path / "scores")
    report = seecal.filter(tmp_path / "scores", tmp_path / "kept.json", tokens=True, by="gain", top=0.6)
    options = CALOptions(weighting="vig", threshold=report.threshold - 1e-7)
    score(data, tmp_path / "vig", options=options)
    rows = {row["id"]: row["weights"] for row in json.loads((tmp_path / "kept.json").read_text("utf8"))}
    vig = {record.record: record.columns["weight"].tolist() for record in read_scores(tmp_path / "vig")}
    assert 0 < report.tokens_removed < report.tokens
    assert rows == {name: weights for name, weights in vig.items() if any(weights)}


def test_the_candidates_can_be_looked_at(tmp_path):
    data = write_llava(tmp_path / "data", 12)
    score(data, tmp_path / "scores")
    before = {row["id"]: row for row in json.loads(data.read_text("utf8"))}
    for options in ({"min_delta": 0.0}, {"tokens": True, "below": below_of(tmp_path / "scores")}):
        kept, gone = tmp_path / f"kept{len(options)}.json", tmp_path / f"gone{len(options)}.json"
        report = seecal.filter(tmp_path / "scores", kept, **options)
        inverse = seecal.filter(tmp_path / "scores", gone, invert=True, **options)
        rows = json.loads(gone.read_text("utf8"))
        assert rows == [before[row["id"]] for row in rows], "as they were, without weights"
        assert [line["row"] for line in log_of(gone)] == [int(row["id"][1:]) for row in rows]
        assert 0 < len(rows) < 12
        assert (inverse.kept, inverse.removed, inverse.reasons) == (report.kept, report.removed, report.reasons)
        if not options.get("tokens"):
            stays = {row["id"] for row in json.loads(kept.read_text("utf8"))}
            assert stays | {row["id"] for row in rows} == set(before)
            assert not stays & {row["id"] for row in rows}


@pytest.mark.parametrize("writer", sources.WRITERS.values(), ids=sources.WRITERS)
def test_every_format_that_holds_lists(tmp_path, writer):
    folder = sources.images_in(tmp_path / "data")
    data = writer(folder, sources.SIMPLE)
    is_path = hasattr(data, "__fspath__")
    score(data, tmp_path / "scores", image_root=None if is_path else folder)
    below = below_of(tmp_path / "scores")
    names = {"captions_csv": "metadata.csv", "captions_jsonl": "captions.jsonl", "saved": "kept", "hub_like": "kept"}
    out = tmp_path / "out" / names.get(writer.__name__, data.name if is_path else "kept.json")
    given = {} if is_path else {"data": data, "image_root": folder}

    def run():
        return seecal.filter(tmp_path / "scores", out, tokens=True, below=below, **given)

    if writer.__name__ == "captions_csv":
        with pytest.raises(ValueError, match=r"metadata.csv: a .csv file holds no lists, so no weights of tokens"):
            run()
        assert not out.exists()
        return
    if writer.__name__ in ("hub_like_streaming", "in_memory"):
        with pytest.raises(ValueError, match="which has no format to be written in"):
            run()
        return
    report = run()
    expected = [weights for weights in by_hand(tmp_path / "scores", below).values() if any(weights)]
    records = seecal.load_records(out, image_root=folder)
    assert not isinstance(records, IterableDataset)
    assert list(records["weights"]) == expected
    assert report.tokens_removed == sum(weights.count(0.0) for weights in expected) > 0
    streamed = list(seecal.load_records(out, image_root=folder, streaming=True))
    assert [record["weights"] for record in streamed] == expected
    score(out, tmp_path / "again", image_root=folder)
    with pytest.raises(ValueError, match="its records bring weights of their tokens already"):
        seecal.filter(tmp_path / "again", out.with_name(f"again{out.suffix}"), tokens=True)


def test_several_parquet_files(tmp_path):
    score(sources.two_parquet_files(tmp_path), tmp_path / "scores")
    below = below_of(tmp_path / "scores")
    seecal.filter(tmp_path / "scores", tmp_path / "kept", tokens=True, below=below)
    expected = [
        [
            float(not (seen and delta < below))
            for delta, seen in zip(one.columns["delta"], one.columns["has_contrast"], strict=True)
        ]
        for one in read_scores(tmp_path / "scores")
    ]
    assert list(seecal.load_records(tmp_path / "kept")["weights"]) == [row for row in expected if any(row)]


def test_rows_without_scores_go_and_the_others_keep_their_weights(tmp_path):
    data = write_llava(tmp_path / "data", 8, r2={"conversations": [{"from": "human", "value": "<image>a"}]})
    score(data, tmp_path / "scores", on_bad="skip")
    below = below_of(tmp_path / "scores")
    seecal.filter(tmp_path / "scores", tmp_path / "data" / "kept.json", tokens=True, below=below)
    expected = {row: weights for row, weights in by_hand(tmp_path / "scores", below).items() if any(weights)}
    records = seecal.load_records(tmp_path / "data" / "kept.json")
    assert dict(zip(records["id"], records["weights"], strict=True)) == {f"r{row}": w for row, w in expected.items()}


def test_what_is_refused(tmp_path):
    data = write_llava(tmp_path / "data", 6)
    score(data, tmp_path / "scores")
    with pytest.raises(ValueError, match=r"tokens by gain need a threshold, which top finds.*Set top"):
        seecal.filter(tmp_path / "scores", tmp_path / "kept.json", tokens=True, by="gain")
    score(data, tmp_path / "cut", on_long="truncate", max_length=40)
    with pytest.raises(ValueError, match=r"records over 40 tokens were cut when they were scored"):
        seecal.filter(tmp_path / "cut", tmp_path / "kept.json", tokens=True)
    assert not (tmp_path / "kept.json").exists()


def test_weights_are_in_every_record_or_in_none(tmp_path):
    rows = [{**row, "weights": [1.0]} for row in sources.llava_rows(sources.SIMPLE)]
    folder = sources.images_in(tmp_path / "data")
    for changed, told in (
        ([rows[0], {**rows[1], "weights": None}], "key 'weights': it has none and the first record has them"),
        ([{**rows[0], "weights": None}, rows[1]], "key 'weights': it has and the first record has none"),
        ([{**rows[0], "weights": 0.5}], "key 'weights': 0.5: expected a list with a number for each label token"),
        ([{**rows[0], "weights": ["a"]}], "expected a list with a number"),
        ([{**rows[0], "weight_ids": [0.5]}], "key 'weight_ids': .*expected a list with a number"),
    ):
        path = sources.write_json(folder / "data.json", changed)
        with pytest.raises(ValueError, match=told):
            seecal.load_records(path)
        left = seecal.load_records(
            path, columns=dict.fromkeys([k for k in ("weights", "weight_ids") if any(k in row for row in changed)])
        )
        assert left.column_names == ["id", "messages", "images"]
    loaded = seecal.load_records(sources.write_json(folder / "data.json", rows))
    with pytest.raises(ValueError, match="set 'a' brings weights of its tokens, which a mixture does not carry"):
        seecal.mix({"a": loaded})


def test_a_set_of_records_in_memory(tmp_path):
    data = seecal.load_records(tiny_dataset(8))
    score(data, tmp_path / "scores")
    below = below_of(tmp_path / "scores")
    seecal.filter(tmp_path / "scores", tmp_path / "kept", data=data, tokens=True, below=below)
    expected = [weights for weights in by_hand(tmp_path / "scores", below).values() if any(weights)]
    kept = seecal.load_records(tmp_path / "kept")
    assert list(kept["weights"]) == expected
    score(kept, tmp_path / "again")
    with pytest.raises(ValueError, match="its records bring weights of their tokens already"):
        seecal.filter(tmp_path / "again", tmp_path / "more", data=kept, tokens=True)


def columns_of(seen, delta, gain):
    without = np.zeros(len(gain), np.float32)
    named = {"has_contrast": np.array(seen), "delta": np.array(delta, np.float32)}
    return {**named, "logprob_with": np.array(gain, np.float32), "logprob_without": without}


def test_the_rule_at_its_edges():
    """A token at the threshold stays; by Δ one without an image before it stays; by gain such a one gains 0, as VIG has it,
    unless its record has no image at all."""
    mixed = columns_of([False, True, True, True], [0, 0.25, 0.5, 2], [0, 0.25, 0.5, 2])
    text_only = columns_of([False, False], [0, 0], [0, 0])
    delta, gain = TokenRule("delta", 0.5), TokenRule("gain", 0.5)
    assert delta.stays(mixed).tolist() == [True, False, True, True]
    assert gain.stays(mixed).tolist() == [False, False, True, True]
    assert delta.stays(text_only).tolist() == gain.stays(text_only).tolist() == [True, True]
