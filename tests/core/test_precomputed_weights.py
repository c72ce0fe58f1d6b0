"""Weights measured before come with the records: they reach the loss, and no image is taken away. And so do record ids."""

import pytest
import torch

import seecal
from seecal import CALConfig, CALOptions, CALTrainer
from seecal.data.collators.vision import VisionCollator
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_llava_processor()


def with_weights(processor, records, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = [int((VisionCollator(processor)([one])["labels"] != -100).sum()) for one in records]
    return [
        {**one, "weights": torch.rand(count, generator=generator).tolist()}
        for one, count in zip(records, counts, strict=True)
    ]


def test_they_are_the_weights_and_nothing_is_contrasted(processor):
    records = with_weights(processor, list(tiny_dataset(5)))
    batch = dict(VisionCollator(processor)(records))
    model = seecal.enable_cal(tiny_llava().train())
    output = model(**batch)
    expected = torch.tensor([weight for record in records for weight in record["weights"]])
    torch.testing.assert_close(output.cal.weights, expected)
    assert output.cal.contrast_tokens == 0
    assert not output.cal.visual_delta.has_contrast.any()
    # the same loss as a weighting that says so
    seecal.WEIGHTINGS["given"] = lambda delta, options: expected
    try:
        other = seecal.enable_cal(tiny_llava().train(), CALOptions(weighting="given"))
        plain = {name: value for name, value in batch.items() if name != "token_weights"}
        torch.testing.assert_close(output.loss, other(**plain).loss)
    finally:
        del seecal.WEIGHTINGS["given"]
    output.loss.backward()


def test_eval_does_not_mind_them(processor):
    batch = dict(VisionCollator(processor)(with_weights(processor, list(tiny_dataset(3)))))
    model = tiny_llava().eval()
    plain = {name: value for name, value in batch.items() if name != "token_weights"}
    expected = model(**plain).loss
    assert torch.equal(seecal.enable_cal(model)(**batch).loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights[:-1], r"'r1'.*weights for \d+ label tokens"),
        (lambda weights: None, r"'r1'.*no weights for \d+ label tokens"),
        (lambda weights: [-1.0, *weights[1:]], "'r1'.*not negative"),
        (lambda weights: [float("nan"), *weights[1:]], "'r1'.*finite"),
    ],
    ids=["one too few", "only in others", "negative", "nan"],
)
def test_weights_that_do_not_fit_name_the_record(processor, change, message):
    records = with_weights(processor, list(tiny_dataset(3)))
    records[1]["weights"] = change(records[1]["weights"])
    with pytest.raises(ValueError, match=message):
        VisionCollator(processor)(records)


def config(folder, **changes):
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return CALConfig(str(folder), max_steps=2, logging_steps=1, gradient_checkpointing=False, **settings, **changes)


def test_the_column_reaches_the_step_of_the_trainer(processor, tmp_path):
    from datasets import Dataset, Value

    plain = tiny_dataset(4)
    weights = [one["weights"] for one in with_weights(processor, list(plain))]
    data = Dataset.from_dict({name: plain[name] for name in plain.column_names} | {"weights": weights}).cast(
        type(plain.features)({**plain.features, "weights": [Value("float32")]})
    )
    trainer = CALTrainer(tiny_llava(), config(tmp_path), train_dataset=data, processing_class=processor)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "label_tokens" in entry]
    assert all(entry["contrast_token_share"] == 0 for entry in logged)


def test_a_non_finite_step_names_its_records(processor, tmp_path):
    model = tiny_llava()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    data = tiny_dataset(4)
    trainer = CALTrainer(
        model, config(tmp_path, per_device_train_batch_size=4), train_dataset=data, processing_class=processor
    )
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert all(f"record 'r{index}'" in str(error.value) for index in range(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights[:, 1:], r"token_weights of shape .* with labels of shape .*not shifted"),
        (lambda weights: weights[0], r"token_weights of shape .* with labels of shape"),
        (lambda weights: weights.flatten()[:, None], r"token_weights of shape .* with labels of shape"),
        (lambda weights: -weights - 0.5, r"token_weights at row 0, column \d+ is -.*: weights must be finite and not"),
        (lambda weights: weights * float("inf"), r"token_weights at row 0, column \d+ is .*finite"),
    ],
    ids=["shifted", "flat", "column", "negative", "infinite"],
)
def test_weights_of_the_batch_that_cannot_be_are_refused(processor, change, message):
    batch = dict(VisionCollator(processor)(with_weights(processor, list(tiny_dataset(3)))))
    batch["token_weights"] = change(batch["token_weights"])
    with pytest.raises(ValueError, match=message):
        seecal.enable_cal(tiny_llava().train())(**batch)


def test_only_weights_of_labels_are_looked_at(processor):
    batch = dict(VisionCollator(processor)(with_weights(processor, list(tiny_dataset(3)))))
    expected = seecal.enable_cal(tiny_llava().train())(**batch).loss
    elsewhere = torch.where(batch["labels"] == -100, float("nan"), batch["token_weights"])
    assert torch.equal(seecal.enable_cal(tiny_llava().train())(**{**batch, "token_weights": elsewhere}).loss, expected)
