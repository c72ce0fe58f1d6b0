"""enable_cal against the equations written as loops, and the behaviour that its contract promises."""

import copy
import inspect

import pytest
import torch
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

import seecal
from seecal import CALOptions
from tests.support.builders import IMAGE, MIXED, Row, batch_of, build
from tests.support.reference import assert_same_gradients, by_the_equations, gradients


@pytest.mark.parametrize("family", ["llava", "tied llava"])
def test_loss_weights_and_gradients_are_the_equations(family):
    model, image_tokens, pixels = build("llava", tied=family == "tied llava")
    batch = batch_of(MIXED, image_tokens, pixels, padding="right")
    plain = copy.deepcopy(model)
    loss, weights = by_the_equations(plain, batch)
    loss.backward()
    output = seecal.enable_cal(model.train())(**batch)
    output.loss.backward()
    assert len(set(weights.round(decimals=3).tolist())) > 10, "all weights alike: this would pass on anything"
    torch.testing.assert_close(output.loss.detach(), loss.detach(), atol=0, rtol=1e-4)
    torch.testing.assert_close(output.cal.weights, weights, atol=1e-4, rtol=0)
    assert_same_gradients(gradients(model), gradients(plain), 1e-4)


@pytest.mark.parametrize("normalize", ["global", "micro_batch", "sample", "tokens", "matched"])
def test_normalisers(case, normalize):
    model, batch = case
    seecal.enable_cal(model, CALOptions(normalize=normalize))
    output = model(**batch)
    cal = output.cal
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(**{**batch, "labels": None}).logits
        delta = cal.visual_delta
        ce = torch.nn.functional.cross_entropy(logits[delta.sample, delta.position - 1], delta.labels, reduction="none")
        if normalize == "sample":
            rows = [delta.sample == row for row in range(len(batch["labels"]))]
            each = [(cal.weights[row] * ce[row]).sum() / cal.weights[row].sum() for row in rows if row.any()]
            expected = torch.stack(each).mean()
        elif normalize == "matched":
            expected = ce.mean()
        else:
            expected = (cal.weights * ce).sum() / (len(ce) if normalize == "tokens" else cal.weights.sum())
        torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cal.loss_sum, (cal.weights * ce).sum(), atol=0, rtol=1e-5)
        torch.testing.assert_close(cal.weight_sum, cal.weights.sum())
        torch.testing.assert_close(cal.cross_entropy, ce.mean(), atol=0, rtol=1e-5)
    output.loss.backward()


@pytest.mark.parametrize("normalize", ["global", "micro_batch", "sample", "tokens", "matched"])
def test_rows_without_a_label_do_not_dilute_the_loss(llava, normalize):
    model, image_tokens, pixels = llava
    rows = [*MIXED[:2], Row([4, "image", 3]), Row([7]), MIXED[3]]
    for index, row in enumerate(rows):
        row.key = index
    labelled = batch_of([rows[0], rows[1], rows[4]], image_tokens, pixels)
    losses = []
    for batch in (labelled, batch_of(rows, image_tokens, pixels)):
        trained = seecal.enable_cal(copy.deepcopy(model).train(), CALOptions(normalize=normalize))
        losses.append(trained(**batch).loss)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("contrast", ["patch_mask", "blur", "noise", "swap"])
def test_a_label_right_after_an_image_has_a_contrast_on_pixels(llava, contrast):
    """There the image's last position predicts it in both passes; dropping or masking has no such position."""
    model, image_tokens, pixels = copy.deepcopy(llava[0]), *llava[1:]
    batch = batch_of([Row([3, "image", -5]), Row([2, "image", -1, 2, -3])], image_tokens, pixels)
    batch["contrast_pixel_values"] = batch["pixel_values"].flip(0)
    after_an_image = [0, 5]
    on_pixels, dropped = (seecal.visual_delta(model, batch, contrast=name) for name in (contrast, "drop"))
    assert on_pixels.has_contrast.all()
    assert on_pixels.delta[after_an_image].abs().min() > 1e-3
    assert not dropped.has_contrast[after_an_image].any()
    with torch.no_grad():
        other = model(**{**batch, "pixel_values": batch["contrast_pixel_values"], "labels": None}).logits
    expected = other[on_pixels.sample, on_pixels.position - 1, on_pixels.labels]
    torch.testing.assert_close(on_pixels.logit_without, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("contrast", ["drop", "mask"])
def test_logprob_deltas_and_dft_are_log_softmax(case, contrast):
    model, batch = case
    logit = seecal.visual_delta(model, batch, contrast=contrast)
    assert logit.logprob_with is None
    got = seecal.visual_delta(model, batch, contrast=contrast, options=CALOptions(delta="logprob", chunk_size=7))
    masked = batch["attention_mask"] * (batch["input_ids"] != IMAGE)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        for mask, ours in ((batch["attention_mask"], got.logprob_with), (masked, got.logprob_without)):
            logprobs = model.eval()(**{**inputs, "attention_mask": mask}).logits.log_softmax(-1)
            expected = logprobs[got.sample, got.position - 1, got.labels]
            torch.testing.assert_close(ours[got.has_contrast], expected[got.has_contrast], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got.delta, got.logprob_with - got.logprob_without)
    assert not got.delta[~got.has_contrast].any()
    torch.testing.assert_close(got.logit_with, logit.logit_with)
    seecal.enable_cal(model.train(), CALOptions(weighting="dft", contrast=contrast))
    output = model(**batch)
    torch.testing.assert_close(output.cal.weights, got.logprob_with.exp(), atol=1e-6, rtol=1e-4)
    # p·CE, as the paper's one line
    expected = (output.cal.weights * -got.logprob_with).sum() / output.cal.weights.sum()
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-4)


def test_equal_weights_give_the_plain_loss_and_gradients(case):
    model, batch = case
    plain = copy.deepcopy(model)
    expected = plain(**batch).loss
    expected.backward()
    for options in (CALOptions(weighting="uniform"), CALOptions(alpha=2.0, beta=2.0)):
        one = seecal.enable_cal(copy.deepcopy(model), options)
        loss = one(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
        assert_same_gradients(gradients(one), gradients(plain), 1e-5)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_sample_does_not_depend_on_its_neighbours_or_its_padding(llava, padding):
    model, image_tokens, pixels = llava
    for index, row in enumerate(MIXED):
        row.key = index  # its tokens and images are its own, wherever it stands
    alone = {}
    for options in (CALOptions(), CALOptions(padding_free=False), CALOptions(contrast="mask")):
        one = seecal.enable_cal(copy.deepcopy(model).train(), options)
        for index, row in enumerate(MIXED):
            cal = one(**batch_of([row], image_tokens, pixels, padding)).cal
            alone[index] = (cal.visual_delta.delta, cal.weights)
        for order, extra in (([4, 2, 0, 3, 1], 0), ([0, 1], 9), ([3, 2], 0), ([2, 2, 4], 3)):
            rows = [MIXED[index] for index in order]
            cal = one(**batch_of(rows, image_tokens, pixels, padding, extra_padding=extra)).cal
            for place, index in enumerate(order):
                mine = cal.visual_delta.sample == place
                torch.testing.assert_close(cal.visual_delta.delta[mine], alone[index][0], atol=2e-4, rtol=0)
                torch.testing.assert_close(cal.weights[mine], alone[index][1], atol=2e-4, rtol=0)


def test_output_is_the_models_own_class(case):
    model, batch = case
    seecal.enable_cal(model)
    output = model(**batch)
    assert isinstance(output, LlavaCausalLMOutputWithPast)
    assert type(output).__name__ == "LlavaCausalLMOutputWithPast"
    assert output.logits is None
    assert output.image_hidden_states is not None
    rebuilt = type(output)(dict(output.items()))  # what accelerate does under mixed precision
    assert rebuilt.cal is output.cal
    leaves, spec = torch.utils._pytree.tree_flatten(output)  # what DDP does
    assert torch.utils._pytree.tree_unflatten(leaves, spec).cal is output.cal
    first, *_, last = model(**batch, return_dict=False)
    torch.testing.assert_close(first, output.loss)
    assert last.main_tokens == int(batch["attention_mask"].sum())


def test_original_forward_in_eval_without_labels_and_with_a_cache(case):
    model, batch = case
    plain = copy.deepcopy(model)
    seecal.enable_cal(model)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    cached = {**batch, "use_cache": True}
    for mode, inputs, recorded in ((False, batch, True), (True, unlabelled, True), (True, cached, False)):
        with torch.set_grad_enabled(recorded):
            expected, got = plain.train(mode)(**inputs), model.train(mode)(**inputs)
        assert type(got) is LlavaCausalLMOutputWithPast
        assert torch.equal(got.logits, expected.logits)
        assert got.loss is None if expected.loss is None else torch.equal(got.loss, expected.loss)


@pytest.mark.parametrize("training", [True, False])
def test_generate(case, training):
    model, batch = case
    one = {"input_ids": batch["input_ids"][:1, :25], "attention_mask": batch["attention_mask"][:1, :25]}
    one["pixel_values"] = batch["pixel_values"][:1]
    call = {**one, "max_new_tokens": 5, "do_sample": False}
    expected = model.train(training).generate(**call)
    assert torch.equal(seecal.enable_cal(model).generate(**call), expected)


def test_the_signature_stays(case):
    model, _ = case
    before = inspect.signature(model.forward)
    seecal.enable_cal(model)
    assert inspect.signature(model.forward) == before


def test_positional_arguments_and_a_batch_without_attention_mask(case):
    model, batch = case
    seecal.enable_cal(model)
    torch.testing.assert_close(
        model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], labels=batch["labels"]).loss,
        model(**batch).loss,
    )
    full = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    none = {name: value for name, value in batch.items() if name != "attention_mask"}
    torch.testing.assert_close(model(**none).loss, model(**full).loss)


def test_deepcopy_uses_its_own_weights(case):
    model, batch = case
    seecal.enable_cal(model)
    before = float(model(**batch).loss.detach())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert float(model(**batch).loss.detach()) == before
    assert abs(float(twin(**batch).loss.detach()) - before) > 1e-3
    twin(**batch).loss.backward()
    assert not gradients(model)
    seecal.disable_cal(twin)
    assert hasattr(model(**batch), "cal")


def test_disable_restores_exactly(case):
    model, batch = case
    attributes = set(vars(model))
    expected = model(**batch)
    seecal.disable_cal(seecal.enable_cal(model))
    assert set(vars(model)) == attributes
    assert "forward" not in vars(model)
    assert torch.equal(model(**batch).loss, expected.loss)
    with pytest.raises(ValueError, match="not enabled"):
        seecal.disable_cal(model)


def test_a_forward_that_was_there_before_is_used_and_comes_back(case):
    model, batch = case
    plain, calls = model.forward, []

    def hooked(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    model.forward = hooked
    seecal.enable_cal(model)
    model.eval()(**batch)
    assert calls == [1]
    seecal.disable_cal(model)
    assert model.forward is hooked


def test_enabling_twice_is_refused(case):
    model, batch = case
    seecal.enable_cal(model)
    with pytest.raises(ValueError, match="already enabled"):
        seecal.enable_cal(model)
    assert hasattr(model(**batch), "cal")


def test_disabling_under_a_wrapper_and_enabling_again(case):
    """accelerate wraps the patched forward for mixed precision; ours then cannot be taken out, only switched off."""
    model, batch = case
    seecal.enable_cal(model)
    patched = model.forward
    model.forward = lambda *args, **kwargs: patched(*args, **kwargs)
    seecal.disable_cal(model)
    assert type(model(**batch)) is LlavaCausalLMOutputWithPast
    seecal.enable_cal(model)
    assert hasattr(model(**batch), "cal")


def test_visual_delta_whatever_the_mode_and_whether_enabled(case):
    model, batch = case
    expected = seecal.visual_delta(model, batch)
    for prepare in (model.eval, model.train, lambda: seecal.enable_cal(model), model.eval):
        prepare()
        mode = model.training
        got = seecal.visual_delta(model, batch)
        assert torch.equal(got.delta, expected.delta)
        assert not got.delta.requires_grad
        assert model.training is mode
    assert hasattr(model.train()(**batch), "cal"), "CAL is still on"
    assert got.runs.shape == got.delta.shape
    assert {got.delta.dtype, got.logit_with.dtype, got.logit_without.dtype} == {torch.float32}


@pytest.mark.parametrize("missing", ["labels", "attention_mask", "input_ids"])
def test_visual_delta_names_what_the_batch_lacks(case, missing):
    model, batch = case
    with pytest.raises(ValueError, match=missing):
        seecal.visual_delta(model, {name: value for name, value in batch.items() if name != missing})


def test_the_contrast_pass_runs_without_dropout_and_every_mode_comes_back(case, caplog):
    model, batch = case
    model.model.language_model.config.attention_dropout = 0.5
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.model.language_model.layers[1].eval()  # somebody froze this one
    seecal.core.forward._say_dropout.cache_clear()
    seecal.enable_cal(model)
    with caplog.at_level("WARNING", logger="seecal"):
        first, second = (model(**batch).cal.visual_delta for _ in range(2))
    assert caplog.text.count("dropout up to 0.5") == 1
    contrast = first.has_contrast
    assert torch.equal(first.logit_without[contrast], second.logit_without[contrast])
    assert not torch.equal(first.logit_with, second.logit_with)
    assert model.model.language_model.layers[0].training
    assert not model.model.language_model.layers[1].training


def test_no_vocabulary_projection_in_the_contrast_pass_and_head_rows_are_label_tokens(case, monkeypatch):
    model, batch = case
    seecal.enable_cal(model)
    rows, heads = [], []
    monkeypatch.setattr(
        "seecal.core.forward.weighted_sum_of_ce",
        lambda hidden, *args, real=seecal.core.forward.weighted_sum_of_ce, **kw: (
            rows.append(len(hidden)),
            real(hidden, *args, **kw),
        )[1],
    )
    model.lm_head.register_forward_pre_hook(lambda *_: heads.append(1))
    tokens = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args: tokens.append(args[0][..., 0].numel())
    )
    cal = model(**batch).cal
    assert rows == [len(cal.weights)]
    assert heads == []
    text_between_first_image_and_last_label = (3 + 19) + (4 + 2 + 7) + 4 + (2 + 7 + 3 + 1)
    assert tokens == [int(batch["attention_mask"].sum()), text_between_first_image_and_last_label]
    assert (cal.main_tokens, cal.contrast_tokens) == tuple(tokens)


@pytest.mark.parametrize("rows", [[Row([5, -3])], [Row([2, "image", 4])], [Row([5])]], ids=["text", "no label", "none"])
def test_batches_with_nothing_to_weigh(case, llava, rows):
    model, _ = case
    seecal.enable_cal(model)
    output = model(**batch_of(rows, llava[1], llava[2]))
    output.loss.backward()
    assert output.cal.contrast_tokens == 0
    assert float(output.cal.weights.sum()) == len(output.cal.weights)
    assert model.lm_head.weight.grad is not None
    if not len(output.cal.weights):
        assert float(output.loss.detach()) == 0


def test_models_that_cannot_work_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=32)
    )
    with pytest.raises(ValueError, match="not a vision-language model"):
        seecal.enable_cal(text)
    with pytest.raises(ValueError, match="not a transformers model"):
        seecal.enable_cal(torch.nn.Linear(2, 2))
    model, *_ = build("llava")
    with pytest.raises(ValueError, match="no language-model head"):
        seecal.enable_cal(model.model)
    with pytest.raises(ValueError, match="WEIGHTINGS"):
        seecal.enable_cal(model, CALOptions(weighting="magic"))
    with pytest.raises(ValueError, match="DataParallel"):
        seecal.enable_cal(torch.nn.DataParallel(model))


def test_a_batch_of_embeddings_is_refused(case):
    model, batch = case
    seecal.enable_cal(model)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"])


def test_visual_delta_measures_whatever_else_the_batch_brings_and_any_contrast_replaces_another(case):
    model, batch = case
    expected = seecal.visual_delta(model, batch)
    brings = {**batch, "token_weights": torch.ones_like(batch["labels"], dtype=torch.float32)}
    assert torch.equal(seecal.visual_delta(model, brings).delta, expected.delta)
    other = CALOptions(contrast="patch_mask", contrast_strength=0.5)
    assert torch.equal(seecal.visual_delta(model, batch, options=other).delta, expected.delta)
    released = CALOptions(contrast="mask", pool_scope="released")
    assert torch.equal(seecal.visual_delta(model, batch, options=released).delta, expected.delta)
    assert seecal.visual_delta(model, batch, contrast="mask", options=released).delta_grid is not None


def test_visual_delta_from_several_threads(case):
    from concurrent.futures import ThreadPoolExecutor

    model, batch = case
    expected = seecal.visual_delta(model, batch).delta
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: seecal.visual_delta(model, batch).delta, range(24)))
    assert all(torch.equal(one, expected) for one in found)
    assert "forward" not in vars(model)


def test_a_sample_of_weight_zero_counts_in_the_mean_over_samples(case):
    model, batch = case
    seecal.WEIGHTINGS["first"] = lambda delta, options: (delta.sample == 0).float()
    try:
        seecal.enable_cal(model, CALOptions(weighting="first", normalize="sample"))
        output = model(**batch)
    finally:
        del seecal.WEIGHTINGS["first"]
    cal = output.cal
    samples = len(cal.visual_delta.sample.unique())
    torch.testing.assert_close(output.loss, cal.loss_sum / cal.weight_sum / samples)
