"""What each weighting costs: decoder slots, projections, never the logits of all tokens. And a step without any weight."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import seecal
from seecal import CALOptions
from seecal.core.weighting import weighting_named
from tests.core.test_weighting_formulas import FORMULAS
from tests.trainer.test_cal_trainer import trainer

# Of MIXED's rows: the text between the first image and the last label; the third is text alone.
TEXT_THAT_COUNTS = (3 + 19) + (4 + 2 + 7) + 0 + 4 + (2 + 7 + 3 + 1)
# name: contrast slots of the drop pass, vocabulary projections beside the loss's own
COSTS = {
    "cal": (TEXT_THAT_COUNTS, 0),
    "uniform": (0, 0),
    "vig": (TEXT_THAT_COUNTS, 2),
    "prior": (TEXT_THAT_COUNTS, 1),
    "negative": (TEXT_THAT_COUNTS, 0),
    "dft": (0, 1),
    "dpa": (TEXT_THAT_COUNTS, 2),
}


class Counted:
    """Decoder slots of every call and the number of vocabulary projections for log-probabilities."""

    def __init__(self, model, monkeypatch):
        self.slots, self.towers, self.projections = [], 0, 0
        layer = model.model.language_model.layers[0]
        layer.register_forward_pre_hook(lambda _, args: self.slots.append(args[0][..., 0].numel()))
        model.model.vision_tower.register_forward_pre_hook(self.tower)
        self.real = seecal.core.delta.label_logprobs
        monkeypatch.setattr("seecal.core.delta.label_logprobs", self.project)

    def tower(self, *_):
        self.towers += 1

    def project(self, *args, **kwargs):
        self.projections += 1
        return self.real(*args, **kwargs)


def test_every_weighting_has_its_costs_here():
    assert list(COSTS) == list(seecal.WEIGHTINGS)


@pytest.mark.parametrize("delta", ["logit", "logprob"])
@pytest.mark.parametrize("name", COSTS)  # dpa's own Δ is a difference of probabilities
def test_costs_what_it_reads(case, monkeypatch, name, delta):
    model, batch = case
    counted = Counted(model, monkeypatch)
    delta = "prob" if name == "dpa" else delta
    seecal.enable_cal(model, CALOptions(weighting=name, delta=delta, threshold=0.5))
    cal = model(**batch).cal
    contrast, projections = COSTS[name]
    if delta == "logprob" and contrast:
        projections = 2  # Δ itself is a difference of log-probabilities
    real = int(batch["attention_mask"].sum())
    assert counted.slots == [real, *([contrast] if contrast else [])]
    assert (cal.main_tokens, cal.contrast_tokens) == (real, contrast)
    assert (counted.towers, counted.projections) == (1, projections)
    found = cal.visual_delta
    assert bool(found.has_contrast.any()) == bool(contrast)
    assert contrast or not found.delta.any()
    expected = torch.tensor(FORMULAS[name](found, CALOptions(weighting=name, threshold=0.5)))
    torch.testing.assert_close(cal.weights, expected, atol=1e-5, rtol=1e-5)
    assert (len(cal.weights.unique()) > 1) == (name != "uniform")


@pytest.mark.parametrize("name", ["uniform", "dft"])
@pytest.mark.parametrize("contrast", ["mask", "blur"])
def test_what_reads_no_contrast_needs_none_of_its_inputs(case, monkeypatch, name, contrast):
    model, batch = case
    counted = Counted(model, monkeypatch)
    seecal.enable_cal(model, CALOptions(weighting=name, contrast=contrast))
    assert model(**batch).cal.contrast_tokens == 0  # this batch has no contrast_pixel_values
    assert counted.slots == [int(batch["attention_mask"].sum())]


@pytest.mark.parametrize("name", COSTS)
def test_visual_delta_measures_whatever_the_weighting_reads(case, name):
    model, batch = case
    kind = {"delta": "prob", "alpha": 0.05} if name == "dpa" else {"delta": "logprob"}
    expected = seecal.visual_delta(model, batch, options=CALOptions(**kind))
    found = seecal.visual_delta(model, batch, options=CALOptions(weighting=name, **kind))
    assert torch.equal(found.delta, expected.delta)
    assert torch.equal(found.has_contrast, expected.has_contrast)
    plain = seecal.visual_delta(model, batch, options=CALOptions(weighting=name))
    reads = weighting_named(name).needs_logprob
    assert [plain.logprob_with is not None, plain.logprob_without is not None] == [reads, reads]


def mean_one(weights, sample):
    """The weights of each sample over their mean."""
    means = {row: weights[sample == row].mean() for row in sample.unique().tolist()}
    return weights / torch.stack([means[row] for row in sample.tolist()])


def test_prior_takes_the_training_pass_where_nothing_is_taken_away(case):
    model, batch = case
    measured = seecal.visual_delta(model, batch, options=CALOptions(delta="logprob"))
    seecal.enable_cal(model, CALOptions(weighting="prior"))
    cal = model(**batch).cal
    assert cal.visual_delta.logprob_with is None
    torch.testing.assert_close(cal.visual_delta.logprob_without, measured.logprob_without, atol=1e-5, rtol=1e-5)
    still = ~measured.has_contrast
    plain = torch.where(still, 1 - measured.logprob_with.exp(), 1 - measured.logprob_without.exp())
    torch.testing.assert_close(cal.weights, mean_one(plain, measured.sample), atol=1e-5, rtol=0)
    # the same where there is nothing to run the pass without the image on
    text = {name: value[2:3] for name, value in batch.items() if name != "pixel_values"}
    cal = model(**text).cal
    assert cal.contrast_tokens == 0
    plain = 1 - cal.visual_delta.logprob_without.exp()
    torch.testing.assert_close(cal.weights, mean_one(plain, cal.visual_delta.sample), atol=1e-6, rtol=0)


class RowsOfLogits(TorchDispatchMode):
    """The most rows of any tensor made meanwhile whose last dimension is ``vocabulary``, the head itself left out."""

    def __init__(self, vocabulary, head):
        super().__init__()
        self.rows, self.vocabulary, self.head = 0, vocabulary, head.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor) or leaf.ndim < 2 or leaf.shape[-1] != self.vocabulary:
                continue
            if leaf.untyped_storage().data_ptr() != self.head:
                self.rows = max(self.rows, leaf.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("options", [{"delta": "logprob"}, {"weighting": "vig"}, {"weighting": "prior"}], ids=str)
def test_log_probabilities_never_hold_the_logits_of_all_tokens(case, options):
    model, batch = case
    options, head = CALOptions(chunk_size=7, **options), model.lm_head.weight
    with RowsOfLogits(len(head), head) as mode:
        found = seecal.visual_delta(model, batch, options=options)
    assert len(found) > 50
    assert mode.rows == 7
    seecal.enable_cal(model, options)
    with RowsOfLogits(len(head), head) as mode:
        model(**batch).loss.backward()
    assert mode.rows == 7
    with RowsOfLogits(len(head), head) as mode:  # the test can fail
        seecal.visual_delta(model, batch, options=CALOptions(delta="logprob"))
    assert mode.rows == len(found)


def test_the_self_test_of_an_undeclared_family_is_left_out_with_its_pass(case, caplog):
    model, batch = case
    model.config.model_type = "unheard_of"
    seecal.enable_cal(model, CALOptions(weighting="dft"))
    with caplog.at_level(logging.WARNING, logger="seecal"):
        model(**batch)
        assert "unheard_of" not in caplog.text
        seecal.disable_cal(model)
        seecal.enable_cal(model)(**batch)
    assert "unheard_of" in caplog.text


# ---- The trainer ----


@pytest.mark.parametrize("contrast", ["drop", "blur"])
@pytest.mark.parametrize("name", ["uniform", "dft"])
def test_the_trainer_logs_no_delta_and_makes_no_images_without_a_contrast(tmp_path, name, contrast):
    this = trainer(tmp_path, changes={"weighting": name, "contrast": contrast})
    assert this.data_collator.contrast is None
    this.train()
    log = this.state.log_history[0]
    assert log["contrast_token_share"] == 0
    assert not {"delta_mean", "share_at_alpha", "share_inside", "share_at_beta"} & set(log)
    assert log["loss"] > 0
    if name == "uniform":
        assert log["loss"] == pytest.approx(log["cross_entropy"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("normalize", ["global", "micro_batch", "sample", "tokens", "matched"])
def test_a_step_in_which_no_token_keeps_its_weight(tmp_path, normalize, accumulation):
    changes = {"weighting": "vig", "threshold": 1e6, "normalize": normalize, "weight_decay": 0.0}
    data = trainer(tmp_path).train_dataset.filter(lambda row: len(row["images"]) > 0)
    this = trainer(tmp_path, changes={**changes, "gradient_accumulation_steps": accumulation}, data=data)
    before = {name: one.clone() for name, one in this.model.state_dict().items()}
    this.train()
    logs = [one for one in this.state.log_history if "label_tokens" in one]
    assert [one["loss"] for one in logs] == [0, 0]
    assert all(one["label_tokens"] > 0 and one["grad_norm"] == 0 and one["delta_mean"] != 0 for one in logs)
    assert all(torch.equal(one, before[name]) for name, one in this.model.state_dict().items())


def test_a_function_of_ones_own_by_its_name_trains(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def twice(visual_delta, options):\n    return visual_delta.delta * 0 + 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    this = trainer(tmp_path / "out", changes={"weighting": "mine:twice"})
    this.train()
    assert this.state.log_history[0]["loss"] == pytest.approx(this.state.log_history[0]["cross_entropy"], rel=1e-5)


def test_a_name_that_leads_nowhere_stops_the_trainer_before_it_trains(tmp_path):
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        trainer(tmp_path, changes={"weighting": "nowhere:f"})
