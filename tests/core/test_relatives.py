"""The relatives of CAL as their papers and codes have them, each against a short formula of its own over whole logits."""

import copy
from types import SimpleNamespace

import pytest
import torch
from trl import SFTTrainer
from trl.trainer.sft_trainer import SFTConfig

import seecal
from seecal import CALOptions, CALTrainer, VisualDelta
from seecal.core.weighting import weights_of
from tests.support.reference import assert_same_gradients, gradients
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

DPA = {"weighting": "dpa", "contrast": "mask", "pool_scope": "released", "normalize": "micro_batch"}


def logits_of(model, batch, **inputs):
    """[B, L-1, V] float32: what predicts each next token."""
    return copy.deepcopy(model).eval()(**{**batch, "labels": None, **inputs}).logits[:, :-1].float()


def trained(case, **options):
    """(output of a training forward, gradients, whole logits with gradients of an equal model, that model)."""
    model, batch = case
    seecal.enable_cal(model, CALOptions(**options))
    output = model(**batch)
    output.loss.backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    seecal.disable_cal(plain)
    logits = plain.eval()(**{**batch, "labels": None}).logits[:, :-1].float()
    return output, gradients(model), logits, plain


def losses_of(logits, labels):
    """([B, L-1] CE, 0 where there is no label; whether there is one)."""
    targets = labels[:, 1:]
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view_as(targets), targets != -100


def test_dft_is_its_repositorys_loss(case):
    """loss_t = stop_grad(p_t) · -log p_t, summed and divided by the number of label tokens."""
    output, found, logits, plain = trained(case, weighting="dft", normalize="tokens")
    ce, counts = losses_of(logits, case[1]["labels"])
    loss = (ce * torch.exp(-ce.detach()) * counts).sum() / counts.sum()
    loss.backward()
    torch.testing.assert_close(output.loss.detach(), loss.detach(), atol=1e-6, rtol=1e-5)
    assert_same_gradients(found, gradients(plain), 1e-5)
    assert output.cal.weight_sum < 0.9 * counts.sum(), "Σ p as the divisor would pass"


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4)])
def test_dft_is_trls(tmp_path, batch_size, accumulation):
    """Two steps of TRL's loss_type="dft": the same losses and the same weights."""
    records = tiny_dataset(8)
    processor = tiny_llava_processor()
    ours = sgd_config(tmp_path / "ours", batch_size, accumulation, weighting="dft", normalize="tokens", max_steps=2)
    theirs = {
        name: getattr(ours, name)
        for name in SFTConfig.__dataclass_fields__
        if SFTConfig.__dataclass_fields__[name].init
    }
    theirs |= {"output_dir": str(tmp_path / "theirs"), "loss_type": "dft", "padding_free": False, "max_length": None}
    theirs |= {"remove_unused_columns": False}
    runs = {}
    for name in ("ours", "theirs"):
        model, shared = tiny_llava(), {"train_dataset": records, "processing_class": processor}
        if name == "ours":
            trainer = CALTrainer(model, ours, **shared)
        else:
            collator = seecal.VisionCollator(processor)
            trainer = SFTTrainer(model, SFTConfig(**theirs), data_collator=collator, **shared)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs[name] = losses, {key: value.clone() for key, value in model.state_dict().items()}
    assert len(runs["ours"][0]) == 2
    torch.testing.assert_close(runs["ours"][0], runs["theirs"][0], atol=1e-5, rtol=1e-5)
    started = tiny_llava().state_dict()
    assert any(not torch.equal(runs["ours"][1][name], started[name]) for name in started)
    for name, value in runs["theirs"][1].items():
        torch.testing.assert_close(runs["ours"][1][name], value, atol=1e-6, rtol=1e-5)


def dpa_of_the_code(logits, without, labels, low=0.05, high=0.5):
    """The repository's loss: id 0 where there is no label, a mean of 3 over the flattened batch, Σ over the labels."""
    targets = labels[:, 1:]
    ids = targets.clamp(min=0)[..., None]
    delta = (logits.softmax(-1).gather(-1, ids) - without.softmax(-1).gather(-1, ids))[..., 0].detach()
    flat = delta.clamp(low, high).flatten().tolist()
    weights = [sum(flat[max(at - 1, 0) : at + 2]) / len(flat[max(at - 1, 0) : at + 2]) for at in range(len(flat))]
    weights = torch.tensor(weights).view_as(targets)
    ce, counts = losses_of(logits, labels)
    return (weights * ce * counts).sum() / ((weights * counts).sum() + 1e-6), weights[counts]


def test_dpa_is_its_released_loss(case):
    model, batch = case
    images = batch["input_ids"] == model.config.image_token_id
    with torch.no_grad():
        without = logits_of(model, batch, attention_mask=batch["attention_mask"] * ~images)
        likely = [logits_of(model, batch).argmax(-1), without.argmax(-1)]
    # labels that the image makes likely and unlikely by turns: probabilities of random ones hardly differ
    turns = torch.arange(likely[0].numel()).view_as(likely[0]) % 3 == 0
    labels = batch["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, torch.where(turns, likely[1], likely[0]))
    batch["labels"] = labels
    output, found, logits, plain = trained(case, **DPA)
    loss, weights = dpa_of_the_code(logits, without, batch["labels"])
    loss.backward()
    torch.testing.assert_close(output.cal.weights, weights, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss.detach(), loss.detach(), atol=1e-5, rtol=1e-5)
    assert_same_gradients(found, gradients(plain), 1e-4)
    assert len(set(weights.round(decimals=4).tolist())) > 5, "all weights alike: this would pass on anything"


def test_dpas_defaults_are_its_scripts():
    options = CALOptions(weighting="dpa")
    assert (options.alpha, options.beta, options.delta, options.window) == (0.05, 0.5, "prob", 3)
    assert CALOptions(weighting="dpa", alpha=0.1, beta=0.2).alpha == 0.1
    assert (CALOptions(weighting="dpa", alpha=0.0).alpha, CALOptions(weighting="dpa", beta=0.9).beta) == (0.0, 0.9)
    others = CALOptions()
    assert (others.alpha, others.beta, others.delta) == (1.0, 5.0, "logit")


@pytest.mark.parametrize("kind", ["logit", "logprob", "prob"])
def test_delta_is_a_difference_of_what_it_says(case, kind):
    model, batch = case
    found = seecal.visual_delta(model, batch, options=CALOptions(delta=kind, alpha=0.0))
    measured = seecal.visual_delta(model, batch, options=CALOptions(delta="logprob"))
    expected = {
        "logit": measured.logit_with - measured.logit_without,
        "logprob": measured.logprob_with - measured.logprob_without,
        "prob": measured.logprob_with.exp() - measured.logprob_without.exp(),
    }[kind]
    torch.testing.assert_close(found.delta, expected, atol=1e-6, rtol=1e-5)
    assert found.delta[found.has_contrast].abs().min() > 0
    assert not found.delta[~found.has_contrast].any()


@pytest.mark.parametrize("exponent", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("normalize", ["global", "tokens", "micro_batch"])
def test_prior_is_its_papers_loss(case, exponent, normalize):
    """L = -Σ k · (w_i / Σ_j w_j) · log P(t_i), j over the k tokens of a caption, over all captions' tokens."""
    output, found, logits, plain = trained(case, weighting="prior", prior_exponent=exponent, normalize=normalize)
    logprobs = seecal.visual_delta(case[0], case[1], options=CALOptions(delta="logprob"))
    ce, counts = losses_of(logits, case[1]["labels"])
    loss, tokens = 0.0, 0
    for row in logprobs.sample.unique().tolist():
        weights = (1 - logprobs.logprob_without[logprobs.sample == row].exp()) ** exponent
        of_row = ce[row][counts[row]]
        loss = loss + (len(weights) * weights / weights.sum() * of_row).sum()
        tokens += len(weights)
    (loss / tokens).backward()
    torch.testing.assert_close(output.loss.detach(), (loss / tokens).detach(), atol=1e-5, rtol=1e-5)
    assert_same_gradients(found, gradients(plain), 1e-4)


def test_prior_in_a_sample_that_is_certain_of_everything():
    """Neither 0 / 0 nor another sample's weights."""
    sample = torch.tensor([0, 0, 1, 1])
    found = VisualDelta(
        torch.zeros(4), sample, sample, torch.tensor([1, 2, 1, 2]), sample.bool(),
        logprob_without=torch.tensor([0.0, 0.0, -1.0, -2.0]),
    )  # fmt: skip
    weights = weights_of(found, CALOptions(weighting="prior"))
    assert weights[:2].tolist() == [0.0, 0.0]
    assert float(weights[2:].mean()) == pytest.approx(1.0)


def test_matched_is_priors_released_loss(case):
    """Entries of 0 are dropped, the mean of the rest is scaled to the plain mean by a factor without a gradient."""
    output, found, logits, plain = trained(case, weighting="prior", normalize="matched")
    weights = torch.zeros_like(case[1]["labels"][:, 1:], dtype=torch.float)
    delta = output.cal.visual_delta
    weights[delta.sample, delta.position - 1] = output.cal.weights
    ce, counts = losses_of(logits, case[1]["labels"])
    weighted = weights * ce
    mean = weighted[weighted != 0].mean()
    loss = mean * (ce[counts].mean() / mean).detach()
    loss.backward()
    torch.testing.assert_close(output.loss.detach(), ce[counts].mean().detach(), atol=1e-5, rtol=1e-5)
    assert_same_gradients(found, gradients(plain), 1e-4)


@pytest.mark.parametrize("normalize", ["tokens", "matched"])
def test_a_batch_without_a_label_is_a_zero_with_gradients(case, normalize):
    model, batch = case
    seecal.enable_cal(model, CALOptions(normalize=normalize))
    output = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert all(value is None or not value.any() for value in gradients(model).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("window", [3, 5])
def test_a_delta_that_is_not_finite_stays_in_its_own_run(bad, window):
    delta = torch.tensor([2.0, bad, 3.0, 4.0, 2.0, 3.0])
    runs = torch.tensor([0, 0, 1, 1, 1, 2])
    got = seecal.token_weights(delta, runs, 1.0, 5.0, window)
    alone = seecal.token_weights(delta[2:], runs[2:], 1.0, 5.0, window)
    assert torch.equal(got[2:], alone)
    assert got[2:].isfinite().all()
    backwards = seecal.token_weights(delta.flip(0), runs.flip(0), 1.0, 5.0, window)
    torch.testing.assert_close(backwards[:-2], alone.flip(0))


def test_tokens_counts_over_the_whole_step(tmp_path):
    """However a step is cut, Σ w·CE of it over its label tokens: weights and counts of the records differ."""
    found = {}
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        args = sgd_config(tmp_path / str(batch_size), batch_size, accumulation, normalize="tokens", max_steps=2)
        model = tiny_llava()
        trainer = CALTrainer(model, args, train_dataset=tiny_dataset(16), processing_class=tiny_llava_processor())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[batch_size] = SimpleNamespace(losses=losses, weights=model.state_dict())
    for size in (2, 1):
        torch.testing.assert_close(found[size].losses, found[8].losses, atol=1e-5, rtol=1e-5)
        for name, value in found[8].weights.items():
            torch.testing.assert_close(found[size].weights[name], value, atol=1e-6, rtol=1e-4)
