"""VIG's records and tokens and PRIOR's weights by a reference, measured once before training, against formulas."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageFilter
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import seecal
from seecal import CALTrainer, VisionCollator
from seecal.recipes import run as train
from seecal.recipes.tiny import tiny_dataset, tiny_folder
from seecal.scoring import read_scores
from seecal.scoring.measure import Scorer
from seecal.scoring.reference import score_reference
from tests.support.recipe_files import recipe_file
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_llava, tiny_llava_processor

COLOURS = ("red", "green", "blue", "yellow")


def two_tone(first, second):
    """An image that a blur changes: one of a single colour it would not."""
    image = Image.new("RGB", (32, 32), first)
    image.paste(second, (0, 0, 13, 32))
    return image


def records(n=12):
    """Every fourth has no image."""
    rows = []
    for number in range(n):
        first, second = COLOURS[number % 4], COLOURS[(number * 7 + 1) % 4]
        messages = [
            {"role": "user", "content": "What colour is it?"},
            {"role": "assistant", "content": f"It is {first}." + " It is." * (number % 3)},
        ]
        images = [] if number % 4 == 3 else [two_tone(first, second)]
        rows.append({"id": f"r{number}", "messages": messages, "images": images})
    return Dataset.from_list(rows, features=tiny_dataset(1).features)


def trainer(folder, data, model=None, **changes):
    settings = {"max_steps": 1, "gradient_checkpointing": False, "per_device_eval_batch_size": 5, **changes}
    args = sgd_config(folder, settings.pop("batch_size", 4), 1, **settings)
    return CALTrainer(model or tiny_llava(), args, train_dataset=data, processing_class=tiny_llava_processor())


def gains(model, data, radius=10.0):
    """The gain of each label token of each record, by whole logits of one record at a time."""
    processor, found = tiny_llava_processor(), []
    for row in data:
        blurred = {**row, "images": [image.filter(ImageFilter.GaussianBlur(radius)) for image in row["images"]]}
        each = []
        for one in (row, blurred):
            batch = VisionCollator(processor)([one])
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model.eval()(**batch).logits[:, :-1].float()
            each.append(-cross_entropy(logits[0], labels[0, 1:], reduction="none")[labels[0, 1:] != -100])
        found.append(each[0] - each[1])
    return found


@pytest.mark.parametrize("percentile", [70, 30, 100])
def test_vig_by_its_percentile(tmp_path, percentile):
    data = records()
    found = gains(tiny_llava(), data)
    seen = [number for number, row in enumerate(data) if row["images"]]
    means = sorted((float(found[number].mean()) for number in seen), reverse=True)
    threshold = means[math.ceil(percentile / 100 * len(means)) - 1]
    expected = {}
    for number, row in enumerate(data):
        if number not in seen:
            expected[row["id"]] = [1.0] * len(found[number])
        elif float(found[number].mean()) >= threshold - 1e-6:
            expected[row["id"]] = (found[number] >= threshold - 1e-6).float().tolist()
    this = trainer(tmp_path, data, weighting="vig", vig_percentile=percentile)
    assert dict(zip(this.train_dataset["id"], this.train_dataset["weights"], strict=True)) == expected
    told = json.loads((tmp_path / "scores" / "vig.json").read_text())
    assert told["threshold"] == pytest.approx(threshold, abs=1e-5)
    assert (told["percentile"], told["kept"], told["removed"]) == (percentile, len(expected), 12 - len(expected))
    assert told["tokens_removed"] == sum(weights.count(0.0) for weights in expected.values())
    assert told["tokens_removed"] > 0
    lines = [json.loads(line) for line in (tmp_path / "scores" / "removed.jsonl").read_text().splitlines()]
    assert {line["record"] for line in lines if line["why"] != "tokens"} == {f"r{n}" for n in range(12)} - set(expected)


def test_what_trains_is_the_mean_over_the_tokens_that_stay(tmp_path):
    data, model = records(), tiny_llava()
    this = trainer(tmp_path, data, model, weighting="vig", vig_percentile=70, batch_size=12)
    batch = VisionCollator(tiny_llava_processor())([this.train_dataset[n] for n in range(len(this.train_dataset))])
    labels, weights = batch.pop("labels")[:, 1:], batch.pop("token_weights")[:, 1:]
    with torch.no_grad():
        logits = model.eval()(**batch).logits[:, :-1].float()
    ce = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    this.train()
    (loss,) = [entry["loss"] for entry in this.state.log_history if "loss" in entry]
    assert loss == pytest.approx(float(ce[weights > 0].mean()), abs=1e-5)
    assert "delta_mean" not in this.state.log_history[0], "nothing is contrasted while it trains"
    assert this.data_collator.contrast is None


def test_a_model_by_its_name_is_measured_as_the_loaded_one(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "model")
    named = trainer(tmp_path / "a", records(), str(tmp_path / "model"), weighting="vig", vig_percentile=70)
    loaded = trainer(tmp_path / "b", records(), weighting="vig", vig_percentile=70)
    assert named.train_dataset.to_list() == loaded.train_dataset.to_list()
    assert 0 < len(named.train_dataset) < 12


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch, caplog):
    first = trainer(tmp_path, records(), weighting="vig", vig_percentile=70)
    assert caplog.text.count("vig_percentile=70: the threshold is ") == 1
    monkeypatch.setattr(Scorer, "shard", lambda *args: pytest.fail("scored again"))
    again = trainer(tmp_path, records(), weighting="vig", vig_percentile=70)
    assert again.train_dataset.to_list() == first.train_dataset.to_list()
    with pytest.raises(ValueError, match=r"scores of another model.*This folder is made before training: delete it"):
        trainer(tmp_path, records(), tiny_llava(seed=3), weighting="vig", vig_percentile=70)


def test_a_recipe_with_one_key_stopped_and_resumed(tmp_path):
    """The second stage is measured by what the first has made; resumed, it is what an uninterrupted run is."""
    tiny = tiny_folder(tmp_path / "tiny")
    for number, name in enumerate(sorted(tiny.glob("images/data-*.png"))):
        two_tone(COLOURS[number % 4], COLOURS[(number + 1) % 4]).save(name)
    changes = {"weighting": "vig", "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1}
    stages = [{"train": "projector", "weighting": "uniform"}, {"vig_percentile": 70, "train": "language_model"}]
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "out", stages=stages, **changes)
    assert train.run(["--config", file]) == 0
    told = json.loads((tmp_path / "out" / "stage-2" / "scores" / "vig.json").read_text())
    assert told["removed"] > 0
    assert not (tmp_path / "out" / "stage-1" / "scores").exists()
    manifest = json.loads((tmp_path / "out" / "stage-2" / "scores" / "_manifest.json").read_text())
    assert manifest["options"]["contrast"] == "blur"
    assert manifest["data"]["rows"] == 64
    whole = (tmp_path / "out" / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "final")
    shutil.rmtree(tmp_path / "out" / "stage-2" / "checkpoint-4")
    assert train.run(["--config", file, "--resume"]) == 0
    assert (tmp_path / "out" / "final" / "model.safetensors").read_bytes() == whole


REFUSED = {
    "another weighting": ({"vig_percentile": 70}, "vig_percentile=70 with weighting='cal'.*Set weighting='vig'"),
    "another contrast": ({"weighting": "vig", "vig_percentile": 70, "contrast": "noise"}, "VIG blurs the image"),
    "no percentage": ({"weighting": "vig", "vig_percentile": 0}, "vig_percentile=0: expected how many percent"),
    "more than all": ({"weighting": "vig", "vig_percentile": 101}, "at most 100"),
    "weights too": ({"weighting": "vig", "vig_percentile": 70, "weights": "x"}, "the weights are there already"),
    "prior by another": ({"weighting": "vig", "prior_reference": "x"}, "prior_reference='x' with weighting='vig'"),
    "nothing there": ({"weighting": "prior", "prior_reference": "no/such/folder"}, "no/such/folder: no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_told(tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, records(4), **changes)


def test_data_that_streams_or_brings_weights(tmp_path):
    changes = {"weighting": "vig", "vig_percentile": 70}
    with pytest.raises(ValueError, match=r"vig_percentile with a IterableDataset.*streaming: false"):
        trainer(tmp_path, records(4).to_iterable_dataset(), **changes)
    with pytest.raises(ValueError, match="vig_percentile, but the records bring a column 'weights'"):
        trainer(tmp_path, records(4).add_column("weights", [[1.0]] * 4), **changes)


# ---- PRIOR by a reference ----


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a language model with the tiny VLM's tokenizer."""
    folder = tmp_path_factory.mktemp("reference")
    tokenizer = tiny_llava_processor().tokenizer
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def text_logprobs(model, row):
    """log p of a record's label tokens by its text without the image, one record at a time."""
    processor = tiny_llava_processor()
    batch = VisionCollator(processor)([row])
    stays = batch["input_ids"][0] != processor.tokenizer.get_vocab()["<image>"]
    ids, labels = batch["input_ids"][:, stays], batch["labels"][:, stays]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    return -cross_entropy(logits, labels[0, 1:], reduction="none")[labels[0, 1:] != -100]


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["a language model", "a vision-language model"])
def test_prior_by_a_reference(tmp_path, reference, exponent, kind):
    if kind == "a language model":
        name, model = reference, AutoModelForCausalLM.from_pretrained(reference).eval()
    else:
        name, model = str(tmp_path / "vlm"), tiny_llava(seed=9).eval()
        model.save_pretrained(name)
        tiny_llava_processor().save_pretrained(name)
    data = records(6)
    changes = {"weighting": "prior", "prior_reference": name, "prior_exponent": exponent}
    this = trainer(tmp_path / "run", data, **changes)
    assert this.train_dataset["id"] == data["id"]
    for row, weights in zip(data, this.train_dataset["weights"], strict=True):
        plain = (1 - text_logprobs(model, row).exp()) ** exponent
        torch.testing.assert_close(torch.tensor(weights), plain / plain.mean(), atol=1e-5, rtol=1e-5)
    assert len({round(weight, 4) for weights in this.train_dataset["weights"] for weight in weights}) > 5
    this.train()
    assert this.state.log_history[0]["loss"] > 0


def test_prior_by_stored_scores(tmp_path, reference):
    data = records(6)
    stored = tmp_path / "stored"
    report = score_reference(reference, data, stored, processor=tiny_llava_processor())
    assert report.records == 6
    changes = {"weighting": "prior", "prior_exponent": 0.5}
    by_scores = trainer(tmp_path / "run", data, prior_reference=str(stored), **changes)
    by_model = trainer(tmp_path / "other", data, prior_reference=reference, **changes)
    assert by_scores.train_dataset["weights"] == by_model.train_dataset["weights"]
    assert not (tmp_path / "run" / "scores").exists()
    online = tmp_path / "online"
    seecal.score(tiny_llava().eval(), data, online, processor=tiny_llava_processor(), logprobs=True)
    own = trainer(tmp_path / "own", data, weighting="prior", prior_reference=str(online))
    for weights, scored in zip(own.train_dataset["weights"], read_scores(online), strict=True):
        plain = 1 - torch.tensor(scored.columns["logprob_without"]).exp()
        torch.testing.assert_close(torch.tensor(weights), plain / plain.mean(), atol=1e-5, rtol=1e-5)


def test_a_caption_alone_is_read_after_what_ends_a_text(tmp_path, reference):
    """A tokenizer that begins with no token of its own: the first label is predicted all the same."""
    processor = tiny_llava_processor(
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% elif m['role'] == "
        "'assistant' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{{ eos_token }}"
    )
    processor.tokenizer.add_bos_token = False
    data = records(2)
    score_reference(reference, data, tmp_path / "s", processor=processor)
    batch = VisionCollator(processor)([data[0], data[1]])
    counts = [(labels != -100).sum().item() for labels in batch["labels"]]
    assert [len(record) for record in read_scores(tmp_path / "s")] == counts


@pytest.mark.parametrize("change", ["another id", "one more word"])
def test_another_tokenizer_is_refused_by_name(tmp_path, reference, change):
    folder = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(reference).save_pretrained(folder)
    tokenizer = tiny_llava_processor().tokenizer
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    if change == "another id":
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    else:
        vocabulary["~new~"] = vocabulary.pop(second)
    words["model"]["merges"] = [merge for merge in words["model"]["merges"] if "".join(merge) in vocabulary]
    file.write_text(json.dumps(words))
    with pytest.raises(
        ValueError, match=r"other: another tokenizer than the model's: .* Take a reference with the model's"
    ):
        trainer(tmp_path / "run", records(2), weighting="prior", prior_reference=str(folder))
