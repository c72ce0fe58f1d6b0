"""The nano models and their tasks: splits, noise, what is measured, and that each pair trains through CALTrainer."""

import collections
import dataclasses
import importlib
import math
import random

import numpy as np
import pytest
import torch
from experiments.nano import align, models
from experiments.nano.__main__ import looked_at
from experiments.nano.measure import deltas, means
from experiments.nano.plan import Plan, plan_of
from experiments.nano.records import plain, record, told, without_image
from experiments.nano.tasks import SPLITS, digest, leaks, task_of
from experiments.nano.words import UNKNOWN
from PIL import Image

import seecal
from experiments import nano

pytest.importorskip("easy_vqa", reason="pip install 'seecal[experiments]'")
pytest.importorskip("vega_datasets", reason="pip install 'seecal[experiments]'")
pytest.importorskip("font_lato", reason="pip install 'seecal[experiments]'")

TINY = {"s": (32, 48, 2, 1), "m": (48, 64, 2, 2)}
PLAN = Plan(tower=1, language=1, joint=1, batch=4, tower_batch=4, align=8, train=8, validation=8, test=8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(models, "SIZES", TINY)


def splits_of(task, count=120, seed=0, answers="sentence"):
    return {split: task_of(task).records(split, count, seed, 64, answers) for split in SPLITS}


@pytest.fixture(scope="module")
def shapes():
    return splits_of("shapes")


def model_of(cell):
    return models.built(cell, task_of(cell.task).texts(), 0)


# ---- Records ----


def test_the_words_of_the_image_are_where_the_spans_say():
    rng = random.Random(0)
    made = record("a", "k", "q ?", "there is a {red} {cross} here", None, "sentence", rng)
    text = made["messages"][1]["content"]
    assert [text[slice(*span)] for span in made["visual"]] == ["red", "cross"]
    assert "there is a red cross here" in text
    assert not text.startswith("there")
    short = record("a", "k", "q ?", "there is a {red} {cross} here", None, "short", rng)
    assert short["messages"][1]["content"] == "red cross"
    assert short["visual"] == [(0, 3), (4, 9)]


@pytest.mark.parametrize("answers", nano.ANSWERS)
@pytest.mark.parametrize("task", nano.TASKS)
def test_each_answer_fits_the_vocabulary_and_what_the_picture_was_drawn_of(task, answers):
    made = splits_of(task, 40, answers=answers)
    tokenizer = model_of(nano.Cell(task=task))[1].tokenizer
    values = {value for known in task_of(task).ATTRIBUTES.values() for value in known}
    for one in [one for split in SPLITS for one in made[split]]:
        for message in one["messages"]:
            assert UNKNOWN not in tokenizer.tokenize(message["content"])
        assert one["images"][0].size == (64, 64)
        if told(one) not in ("yes", "no"):
            assert set(told(one).split()) <= values
        if task != "shapes":
            known = one["attributes"].items()
            assert set(told(one).split()) <= {tuple(task_of(task).ATTRIBUTES[name])[value] for name, value in known}


@pytest.mark.parametrize("task", nano.TASKS)
def test_the_seed_chooses_the_training_and_never_the_test(task):
    first, again, other = (splits_of(task, 30, seed) for seed in (0, 0, 1))
    texts = lambda split: [(one["messages"], digest(one["images"][0])) for one in split]  # noqa: E731
    for split in SPLITS:
        assert texts(first[split]) == texts(again[split])
        assert (texts(first[split]) == texts(other[split])) == (split == "test")


# ---- Hygiene ----


@pytest.mark.parametrize("task", nano.TASKS)
def test_nothing_of_the_test_set_is_in_the_training(task):
    made = splits_of(task)
    assert all(len(made[split]) == 120 for split in SPLITS)
    assert leaks(task_of(task), made) == []


def test_no_picture_of_the_published_test_set_is_one_of_its_training():
    package = importlib.import_module("easy_vqa")

    def contents(paths):
        found = set()
        for path in paths.values():
            with Image.open(path) as file:
                found.add(digest(file.convert("RGB")))
        return found

    training = contents(package.get_train_image_paths())
    test = contents(package.get_test_image_paths())
    assert len(training) > 3900
    assert not training & test


def test_a_leak_is_found(shapes):
    reading = splits_of("reading")
    shown = {**shapes["train"][0], "images": shapes["test"][0]["images"]}
    assert len(leaks(task_of("shapes"), {**shapes, "train": [shown]})) == 1
    font = {**reading["align"][0], "font": "Lato-Black"}
    (said,) = leaks(task_of("reading"), {**reading, "align": [font]})
    assert said == "1 held-out things of the test set are in align, such as Lato"


def test_splits_of_a_seed_share_no_picture(shapes):
    seen = [{digest(one["images"][0]) for one in shapes[split]} for split in SPLITS]
    assert sum(map(len, seen)) == len(set.union(*seen))


# ---- Noise ----


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.35, 0.4])
@pytest.mark.parametrize("task", nano.TASKS)
def test_exactly_that_share_of_answers_is_exchanged(task, share):
    clean = task_of(task).records("train", 130, 0, 64, "sentence")
    noisy = nano.swapped(clean, share, seed=1)
    changed = [place for place in range(len(clean)) if told(clean[place]) != told(noisy[place])]
    assert len(changed) == round(share * 130)
    assert changed == [place for place, one in enumerate(noisy) if one.get("swapped")]
    for one, other in zip(clean, noisy, strict=True):
        assert one["messages"][0] == other["messages"][0]
        assert one["images"] == other["images"]
        assert one["kind"] == other["kind"]
    said = {kind: {told(one) for one in clean if one["kind"] == kind} for kind in {one["kind"] for one in clean}}
    assert all(told(noisy[place]) in said[noisy[place]["kind"]] for place in changed)


def test_noise_is_the_seeds_and_leaves_each_answer_as_frequent(shapes):
    clean = shapes["train"]
    noisy = nano.swapped(clean, 0.2, 3)
    assert noisy == nano.swapped(clean, 0.2, 3)
    assert noisy != nano.swapped(clean, 0.2, 4)
    assert not any("swapped" in one for one in clean)
    frequent = [collections.Counter((one["kind"], told(one)) for one in records) for records in (clean, noisy)]
    assert frequent[0] == frequent[1]


def test_too_much_noise_is_refused(shapes):
    same = [one for one in shapes["train"] if told(one) == "yes"]
    with pytest.raises(ValueError, match="only 0 have another one of their kind"):
        nano.swapped(same, 0.5, 0)
    with pytest.raises(ValueError, match=r"share=1\.5"):
        nano.swapped(same, 1.5, 0)


def test_commonest_answer(shapes):
    kinds = collections.defaultdict(list)
    for one in shapes["test"]:
        kinds[one["kind"]].append(told(one))
    by_hand = sum(max(said.count(word) for word in said) for said in kinds.values()) / 120
    assert align.commonest(shapes["test"]) == pytest.approx(by_hand)


# ---- Measuring ----


@pytest.mark.parametrize("model", nano.MODELS)
def test_measure_against_a_record_at_a_time(model, shapes):
    """Each record alone, its words looked up by hand."""
    records = shapes["test"][:6]
    built, processor = model_of(nano.Cell(model))
    with torch.no_grad():
        built.get_output_embeddings().weight.mul_(20)
    found = nano.measure(built, processor, records)
    assert found["item"].tolist() == list(range(6))
    for place, one in enumerate(records):
        batch = seecal.VisionCollator(processor)(plain([one]))
        with torch.no_grad():
            logits = built.eval()(**batch).logits[0].double()
        at = (batch["labels"][0] != -100).nonzero()[:, 0]
        labels = batch["labels"][0, at]
        words = [*one["messages"][1]["content"].split(), "<eos>"]
        assert processor.tokenizer.convert_ids_to_tokens(labels.tolist()) == words
        nll = -logits[at - 1].log_softmax(-1)[torch.arange(len(at)), labels]
        (word,) = (number for number, text in enumerate(words) if text == told(one))
        rest = [number for number in range(len(words)) if number != word]
        assert found["nll_visual"][place] == pytest.approx(nll[word].item(), abs=1e-4)
        assert found["nll_filler"][place] == pytest.approx(nll[rest].mean().item(), abs=1e-4)
        assert found["exact"][place] == int(logits[at - 1].argmax(-1)[word] == labels[word])
        assert found["labels"][place] == labels[word]


def test_measure_leaves_a_training_model_as_it_was(shapes):
    built, processor = model_of(nano.Cell())
    seecal.enable_cal(built, seecal.CALOptions())
    forward = built.forward
    built.train()
    nano.measure(built, processor, shapes["test"][:2])
    assert built.training
    assert built.forward == forward


def test_the_temperature_is_the_one_that_makes_logits_true():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 7)) * 2
    shares = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    labels = np.array([rng.choice(7, p=share) for share in shares])
    told_of = {"logits": (true * 3).astype(np.float32), "labels": labels, "item": np.arange(4000), "exact": labels}
    found = nano.fitted(told_of, told_of)
    assert found["temperature"] == pytest.approx(3, rel=0.08)
    by_hand = -np.log(
        np.exp(true * 3 / found["temperature"]) / np.exp(true * 3 / found["temperature"]).sum(1, keepdims=True)
    )
    assert found["nll_visual"] == pytest.approx(by_hand[np.arange(4000), labels], abs=1e-4)


def test_delta_by_class_against_visual_delta(shapes):
    built, processor = model_of(nano.Cell("llava"))
    records = shapes["test"][:4]
    delta = seecal.visual_delta(built.eval(), dict(seecal.VisionCollator(processor)(plain(records)))).delta
    words = [word for one in records for word in [*one["messages"][1]["content"].split(), "<eos>"]]
    seen = torch.tensor([word in {told(one) for one in records} for word in words])
    found = means(deltas(built, processor, records))
    assert found["visual"] == pytest.approx(delta[seen].mean().item(), abs=1e-4)
    assert found["filler"] == pytest.approx(delta[~seen].mean().item(), abs=1e-4)


@pytest.mark.parametrize(("visual", "filler", "accuracy", "said"), [
    (1.5, 0.2, 0.7, True), (0.9, 0.2, 0.7, False), (1.5, 1.6, 0.7, False), (1.5, 0.2, 0.59, False),
])  # fmt: skip
def test_which_cells_count(visual, filler, accuracy, said):
    facts = {"commonest": 0.2, "delta": {"visual": visual, "filler": filler}}
    assert nano.counts(facts, accuracy) == said


# ---- Models and alignment ----


@pytest.mark.parametrize("task", nano.TASKS)
@pytest.mark.parametrize("model", nano.MODELS)
def test_every_pair_trains(model, task, tmp_path):
    built, processor = model_of(nano.Cell(model, task))
    noisy = nano.swapped(task_of(task).records("train", 12, 0, 64, "sentence"), 0.25, 0)
    before = {name: value.clone() for name, value in built.named_parameters()}
    trainer = nano.trained(built, processor, noisy, tmp_path, steps=2, rate=1e-3, batch=4, seed=0, alpha=0.0, beta=1.0)
    assert trainer.state.global_step == 2
    assert "share_inside" in trainer.state.log_history[0]
    still = [name for name, value in built.named_parameters() if torch.equal(value, before[name])]
    # LLaVA's towers hand on what stands before their last norm; SigLIP's keys have a bias that no softmax sees
    assert all("post_layernorm" in name or "k_proj.bias" in name for name in still)


@pytest.mark.parametrize("model", nano.MODELS)
def test_every_model_is_aligned(model, tmp_path):
    made = nano.aligned(nano.Cell(model, "scenes"), 0, tmp_path, plan=PLAN)
    assert made.facts["accuracy"] <= 1
    assert math.isfinite(made.facts["delta"]["visual"])
    assert list(made.facts["seconds"]) == ["tower", "language", "joint", "measuring"]
    tower, projector, language = models.parts(made.model)
    assert not any(value.requires_grad for value in tower)
    assert all(value.requires_grad for value in (*projector, *language))
    assert len({id(value) for value in (*tower, *projector, *language)}) == len(list(made.model.parameters()))


@pytest.mark.parametrize("side", nano.SIDES)
@pytest.mark.parametrize("model", nano.MODELS)
def test_image_tokens(model, side):
    """The processor's placeholders are as many as the model's features, and twice as fine a picture has more."""
    built, processor = model_of(nano.Cell(model, "scenes", side=side))
    one = task_of("scenes").records("train", 1, 0, side, "short")
    batch = seecal.VisionCollator(processor)(plain(one))
    image = getattr(built.config, "image_token_id", None) or built.config.image_token_index
    expected = {"llava_next": {64: 4 + 16 + 4, 96: 9 + 36 + 6}}.get(model, {64: 16, 96: 36})[side]
    assert int((batch["input_ids"] == image).sum()) == expected
    assert built(**batch).loss.isfinite()


@pytest.mark.parametrize("size", nano.SIZES)
@pytest.mark.parametrize("model", nano.MODELS)
def test_a_nano_model_has_one_to_four_million_parameters(model, size, monkeypatch):
    monkeypatch.undo()
    built, _ = model_of(nano.Cell(model, size=size))
    assert 1e6 <= sum(value.numel() for value in built.parameters()) <= 4e6


def test_alignment_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    cell = nano.Cell(task="scenes")
    calls = []
    real = align.trained

    def stopped(*given, **named):
        calls.append(named["steps"])
        if len(calls) == 2:  # the joint part
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(align, "trained", stopped)
    with pytest.raises(KeyboardInterrupt):
        nano.aligned(cell, 0, tmp_path, plan=PLAN)
    first = nano.aligned(cell, 0, tmp_path, plan=PLAN)
    assert len(calls) == 3  # the language model is not trained again
    again = nano.aligned(cell, 0, tmp_path, plan=PLAN)
    assert len(calls) == 3
    assert first.facts == again.facts
    whole = nano.aligned(cell, 0, tmp_path / "other", plan=PLAN)
    for one, other in zip(first.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_another_plan_is_another_alignment(tmp_path):
    cell = nano.Cell(task="scenes")
    nano.aligned(cell, 0, tmp_path, plan=PLAN)
    nano.aligned(cell, 0, tmp_path, plan=dataclasses.replace(PLAN, joint=2))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cold_start_trains_the_projector_alone(tmp_path):
    made = nano.aligned(nano.Cell(task="scenes"), 0, tmp_path, plan=PLAN, cold=True)
    fresh, _ = model_of(nano.Cell(task="scenes"))
    parts = zip(models.parts(made.model), models.parts(fresh), strict=True)
    same = [all(torch.equal(one, other) for one, other in zip(*pair, strict=True)) for pair in parts]
    assert same == [True, False, True]
    assert list(made.facts["seconds"]) == ["joint", "measuring"]


def test_calibrated(tmp_path):
    made = nano.aligned(nano.Cell(task="scenes"), 0, tmp_path, plan=PLAN)
    alpha, beta = nano.calibrated(made)
    batch = dict(seecal.VisionCollator(made.processor)(plain(made.validation)))
    delta = seecal.visual_delta(made.model.eval(), batch).delta
    found = deltas(made.model, made.processor, made.validation)
    share = len(found["visual"]) / len(delta)
    assert 0.1 < share < 0.3
    assert alpha == pytest.approx(max(0, delta.quantile(1 - share).item()), abs=0.02)
    assert beta == pytest.approx(max(0, delta.quantile(1 - 0.4 * share).item()), abs=0.02)
    assert alpha < beta


def test_stored_weights_reach_the_training(tmp_path):
    """Weights of 0 leave nothing to learn: no weight of the model moves."""
    cell = nano.Cell(task="scenes")
    built, processor = model_of(cell)
    records = task_of("scenes").records("train", 4, 0, 64, "short")
    ids = [
        processor.tokenizer(f"{one['messages'][1]['content']}", add_special_tokens=False).input_ids for one in records
    ]
    zero = [
        {**one, "weights": [0.0] * (len(said) + 1), "weight_ids": [*said, processor.tokenizer.eos_token_id]}
        for one, said in zip(records, ids, strict=True)
    ]
    before = [value.clone() for value in built.parameters()]
    settings = {"steps": 1, "rate": 1e-2, "batch": 4, "seed": 0, "weight_decay": 0.0}
    nano.trained(built, processor, zero, tmp_path, **settings)
    assert all(torch.equal(*pair) for pair in zip(before, built.parameters(), strict=True))


def test_what_a_cell_reaches(tmp_path):
    changes = {**dict.fromkeys(("align", "train", "validation", "test", "batch", "tower_batch"), 8.0)}
    changes |= {"tower": 1.0, "language": 1.0, "joint": 1.0, "tuning": 2.0}
    told_of = looked_at(nano.Cell(task="scenes"), 0, tmp_path, changes)
    assert told_of["counts"] is False
    assert sorted(told_of["accuracy"]) == ["one", "two"]
    assert told_of["aligned"]["commonest"] >= 1 / 8


def test_a_plan_of_a_task_and_a_machine():
    cell = nano.Cell()
    assert plan_of(cell) == nano.PLANS["cpu"]
    assert plan_of(nano.Cell(task="reading")).tower > plan_of(cell).tower
    assert plan_of(nano.Cell(task="reading"), "gpu", 2).tower == 2
    assert plan_of(nano.Cell("qwen2_vl")).tower < plan_of(nano.Cell("qwen2_vl", "reading")).tower < plan_of(cell).tower
    with pytest.raises(ValueError, match="scale='tpu'"):
        plan_of(cell, "tpu")


def test_a_row_without_its_image(shapes):
    one = without_image(shapes["train"][0])
    assert one["images"] == []
    assert one["messages"] == shapes["train"][0]["messages"]


@pytest.mark.parametrize(("name", "value"), [("model", "gpt"), ("task", "poetry"), ("side", 224)])
def test_there_is_no_such_cell(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: there is no such cell"):
        nano.Cell(**{name: value})


def test_names_of_cells():
    assert str(nano.Cell()) == "llava-shapes-s-64-sentence"
