"""Training with weights from a folder of scores: the right ones, or an error that names the record."""

import json

import pytest
import torch
from datasets import IterableDataset

import seecal
from seecal import CALConfig, CALOptions, CALTrainer, VisionCollator
from seecal.scoring import read_scores
from seecal.scoring.join import with_weights
from tests.scoring.test_score import write_llava
from tests.support import sources
from tests.support.tiny import tiny_dataset, tiny_llava


def score(data, out, processor, **options):
    seecal.score(tiny_llava().eval(), data, out, processor=processor, records_per_shard=3, batch_size=4, **options)
    return out


def weights_of_batches(data, processor):
    """Each record's weights at its labels, as the collator gives them to the model."""
    found = []
    for begin in range(0, len(data), 2):
        batch = VisionCollator(processor)([data[index] for index in range(begin, min(begin + 2, len(data)))])
        found += [row[labels != -100] for row, labels in zip(batch["token_weights"], batch["labels"], strict=True)]
    return found


@pytest.mark.parametrize("writer", sources.WRITERS.values(), ids=sources.WRITERS)
def test_every_format(writer, tmp_path, processor):
    content = sources.RICH if writer.__name__ in sources.CONVERSATIONS else sources.SIMPLE
    data = writer(sources.images_in(tmp_path / "data"), content)
    score(data, tmp_path / "scores", processor)
    records = seecal.load_records(data, streaming=False)
    if isinstance(records, IterableDataset):
        with pytest.raises(
            ValueError, match="weights are joined to records by their place, which a set that streams has"
        ):
            with_weights(records, tmp_path / "scores")
        return
    found = weights_of_batches(with_weights(records, tmp_path / "scores"), processor)
    for weights, scored in zip(found, read_scores(tmp_path / "scores"), strict=True):
        assert weights.tolist() == scored.columns["weight"].tolist()


# What streams has no places to join by: test_every_format has its error
IN_PLACES = {name: writer for name, writer in sources.WRITERS.items() if writer is not sources.hub_like_streaming}


@pytest.mark.slow  # half a minute
@pytest.mark.parametrize("writer", IN_PLACES.values(), ids=IN_PLACES)
def test_score_then_train_on_two_hundred_records(writer, tmp_path, processor):
    """Of each format: the first step is the one that the online pass gives, and all of it can be trained on."""
    content = sources.RICH if writer.__name__ in sources.CONVERSATIONS else sources.SIMPLE
    data = writer(sources.images_in(tmp_path / "data"), content * 50)
    seecal.score(tiny_llava().eval(), data, tmp_path / "scores", processor=processor)
    losses = []
    for weights in (None, str(tmp_path / "scores")):
        arguments = config(tmp_path / "out", weights=weights, learning_rate=0.0)
        arguments.max_steps = 1 if weights is None else 50
        trainer = CALTrainer(
            tiny_llava(), arguments, train_dataset=seecal.load_records(data), processing_class=processor
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[1]) == 50
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-5)


def config(folder, **changes):
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    return CALConfig(str(folder), **settings, **changes)


@pytest.mark.parametrize("contrast", ["drop", "blur"])
def test_the_first_step_is_that_of_the_online_pass(contrast, tmp_path, processor):
    data, options = tiny_dataset(8), CALOptions(contrast=contrast, beta=3.0)
    score(data, tmp_path / "scores", processor, options=options)
    steps, gradients, widths = [], [], []
    for weights in (None, str(tmp_path / "scores")):
        model = tiny_llava()
        arguments = config(tmp_path / "out", weights=weights, contrast=contrast, beta=3.0, max_grad_norm=1e9)
        trainer = CALTrainer(model, arguments, train_dataset=data, processing_class=processor)
        kept = {}
        trainer.add_callback(_keep_gradients(model, kept))
        trainer.train()
        steps.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        gradients.append(kept)
        widths.append(trainer.data_collator.contrast)
    assert widths == [None if contrast == "drop" else contrast, None]
    assert steps[1] == pytest.approx(steps[0], abs=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def _keep_gradients(model, kept):
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            named = [(name, parameter.grad) for name, parameter in model.named_parameters()]
            kept.update({name: grad.clone() for name, grad in named if grad is not None})

    return Keep()


def test_a_mixture(tmp_path, processor):
    sets = {name: seecal.load_records(tiny_dataset(4, seed)) for seed, name in enumerate("ab")}
    mixed = seecal.mix(sets, stopping="all_exhausted_without_replacement")
    score(mixed, tmp_path / "scores", processor)
    assert len(weights_of_batches(with_weights(mixed, tmp_path / "scores"), processor)) == 8
    other = seecal.mix(sets, seed=1, stopping="all_exhausted_without_replacement")
    with pytest.raises(ValueError, match=r"its record \d is 'r\d' of [ab], that of the data 'r\d' of [ab]"):
        with_weights(other, tmp_path / "scores")


def test_bad_rows_that_are_in_neither(tmp_path, processor):
    data = write_llava(tmp_path / "data", 8, r2={"conversations": [{"from": "human", "value": "<image>a"}]})
    score(data, tmp_path / "scores", processor, on_bad="skip")
    found = with_weights(seecal.load_records(data, on_bad="skip"), tmp_path / "scores")
    scored = [record for record in read_scores(tmp_path / "scores") if hasattr(record, "columns")]
    assert [weights.tolist() for weights in weights_of_batches(found, processor)] == [
        record.columns["weight"].tolist() for record in scored
    ]


def test_a_record_without_scores(tmp_path, processor):
    data = write_llava(tmp_path / "data", 6)
    image = tmp_path / "data" / "r3.png"
    image.write_bytes(image.read_bytes()[:60])  # its header is whole, so loading takes it
    score(data, tmp_path / "scores", processor, on_bad="skip")
    with pytest.raises(ValueError, match=r"record 'r3' \(data.json, row 3\) has no scores: data.json: row 3: .*r3"):
        with_weights(seecal.load_records(data), tmp_path / "scores")


def test_other_data(tmp_path, processor):
    data = write_llava(tmp_path / "data", 6)
    score(data, tmp_path / "scores", processor)
    rows = json.loads(data.read_text("utf8"))
    fewer = sources.write_json(data.parent / "fewer.json", rows[:5])
    with pytest.raises(ValueError, match=r"6 records were scored .* and 5 are to be trained on"):
        with_weights(seecal.load_records(fewer), tmp_path / "scores")
    swapped = sources.write_json(data.parent / "swapped.json", [rows[1], rows[0], *rows[2:]])
    with pytest.raises(ValueError, match=r"its record 0 is 'r0' of data.json, that of the data 'r1'"):
        with_weights(seecal.load_records(swapped), tmp_path / "scores")
    joined = with_weights(seecal.load_records(data), tmp_path / "scores")
    with pytest.raises(ValueError, match="bring a column 'weights' of their own"):
        with_weights(joined, tmp_path / "scores")


def test_other_tokens_of_the_same_number(tmp_path, processor):
    """What ids cannot tell: the answer has been changed since."""
    data = write_llava(tmp_path / "data", 3)
    score(data, tmp_path / "scores", processor)
    rows = json.loads(data.read_text("utf8"))
    answer = rows[1]["conversations"][1]["value"]
    rows[1]["conversations"][1]["value"] = answer[:-1] + "?"
    changed = seecal.load_records(sources.write_json(data.parent / "changed.json", rows))
    with pytest.raises(
        ValueError, match=r"'r1': its weights were measured for other tokens than its labels. Score the"
    ):
        weights_of_batches(with_weights(changed, tmp_path / "scores"), processor)


def test_from_a_recipe(tmp_path, monkeypatch):
    from seecal.recipes import run, tiny

    monkeypatch.chdir(tmp_path)
    folder = tiny.tiny_folder(tmp_path / "out" / "tiny")
    seecal.score(str(folder / "model"), str(folder / "data.json"), "scores")
    arguments = [
        "--config",
        "tiny",
        "--weights",
        "scores",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--output_dir",
        "run",
    ]
    assert run.run([*arguments, "--disable_tqdm", "--report_to", "none"]) == 0
    logs = [json.loads(path.read_text("utf8")) for path in (tmp_path / "run").rglob("trainer_state.json")]
    found = [entry for log in logs for entry in log["log_history"] if "contrast_token_share" in entry]
    assert found
    assert all(entry["contrast_token_share"] == 0 for entry in found)
