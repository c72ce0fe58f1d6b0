"""Attention inside the segments of a packed row: against a dense block-diagonal mask, by every route that it may take."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from seecal import CALOptions, enable_cal
from seecal.ops import segment_attention as segments
from seecal.ops.segment_attention import Prefixes, SegmentMask, segment_bounds, variable_length_kernel
from tests.support.builders import MIXED, batch_of, build

LENGTHS = [(7,), (1, 1, 1), (5, 1, 9), (3, 40, 2)]


def dense(lengths):
    """[1, 1, T, T] bool: causal, and the same segment."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ((owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril())[None, None]


def inputs(lengths, heads=4, key_heads=4, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = lambda count: (1, count, sum(lengths), width)  # noqa: E731
    return [
        torch.randn(shape(count), generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def results(mask, lengths, **options):
    query, key, value = inputs(lengths, **{name: options.pop(name) for name in ("key_heads",) if name in options})
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), query.grad, key.grad, value.grad]


def fake_kernel(calls):
    """What torch's variable-length attention computes, for the CPU, from its bounds alone."""

    def attend(query, key, value, bounds, key_bounds, longest, key_longest, scale):
        calls.append((bounds.tolist(), key_bounds.tolist(), longest, key_longest))
        # A kernel for GPUs lays its blocks out by these: one too small leaves the end of a segment out
        assert longest == int(bounds.diff().max())
        assert key_longest == int(key_bounds.diff().max())
        parts = []
        for start, stop, first, last in zip(bounds, bounds[1:], key_bounds, key_bounds[1:], strict=False):
            q = query[start:stop].transpose(0, 1)[None]
            k, v = (one[first:last].transpose(0, 1)[None] for one in (key, value))
            may_look = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            out = scaled_dot_product_attention(q, k, v, attn_mask=may_look, scale=scale)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    return attend


@pytest.fixture(params=["a call a segment", "kernel"])
def route(request, monkeypatch):
    calls = []
    if request.param == "kernel":
        monkeypatch.setattr(segments, "suits_the_kernel", lambda *_: True)
        monkeypatch.setattr(segments, "variable_length_kernel", lambda: fake_kernel(calls))
    return request.param, calls


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"key_heads": 2, "enable_gqa": True}], ids=str)
def test_equals_the_dense_mask(route, lengths, options):
    ours = results(SegmentMask(lengths, torch.device("cpu")), lengths, **options)
    theirs = results(dense(lengths), lengths, **options)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    name, calls = route
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert calls == ([(ends, ends, max(lengths), max(lengths))] if name == "kernel" else [])


def test_under_autocast_the_kernel_gets_autocasts_precision(monkeypatch):
    """Rotary embeddings leave float32 queries: scaled_dot_product_attention casts them, the kernel does not take them."""
    seen = []

    def kernel(query, key, value, *rest):
        seen.extend([query.dtype, key.dtype, value.dtype])
        return query

    monkeypatch.setattr(segments, "suits_the_kernel", lambda *_: True)
    monkeypatch.setattr(segments, "variable_length_kernel", lambda: kernel)
    query, key, value = (one.detach().float() for one in inputs((3, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        scaled_dot_product_attention(query, key, value, attn_mask=SegmentMask((3, 2), torch.device("cpu")))
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"key_heads": 2, "enable_gqa": True}], ids=str)
def test_keys_kept_from_another_row_are_as_good_as_ones_own(route, options):
    """Segments of 4 + 3, 0 + 2 and 1 + 5 slots: the first of each kept from the whole row, the rest attends with them."""
    whole, before = (7, 2, 6), (4, 0, 1)
    starts = [0, 7, 9]
    kept = torch.tensor([start + one for start, count in zip(starts, before, strict=True) for one in range(count)])
    own = torch.tensor([one for one in range(15) if one not in kept])
    prefixes = Prefixes(kept)
    inner = {name: value for name, value in options.items() if name != "key_heads"}
    rows = inputs(whole, key_heads=options.get("key_heads", 4))
    expected = scaled_dot_product_attention(*rows, attn_mask=SegmentMask(whole, own.device, recorded=prefixes), **inner)
    prefixes.recording = False
    scaled_dot_product_attention(*rows, attn_mask=SegmentMask(whole, own.device, recorded=prefixes), **inner)
    assert prefixes.layers == 1, "a recomputation is not taken down again"
    short = [one.index_select(2, own) for one in rows]
    mask = SegmentMask((3, 2, 5), own.device, recalled=(prefixes, before))
    got = scaled_dot_product_attention(*short, attn_mask=mask, **inner)
    torch.testing.assert_close(got, expected.index_select(2, own), atol=1e-12, rtol=1e-12)
    assert prefixes.layers == 0


def test_it_holds_nothing_and_travels():
    mask = SegmentMask((3000, 5000), torch.device("cpu"))
    assert mask.shape == (1, 1, 8000, 8000)
    assert mask.dtype == torch.bool
    assert mask.untyped_storage().nbytes() == 1
    for same in (mask.to("cpu"), mask[:, :, :, :8000], mask.contiguous(), mask.detach()):
        assert same is mask


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask + 0.0,
        lambda mask: mask[:, :, :2],
        lambda mask: mask[:, :, [1, 0, 2, 3, 4]],
        lambda mask: mask.all(),
        lambda mask: ~mask,
    ],
)
def test_as_plain_booleans_it_is_refused(use):
    with pytest.raises(ValueError, match="padding_free=False"):
        use(SegmentMask((3, 2), torch.device("cpu")))


@pytest.mark.parametrize(
    "signature",
    [
        lambda query, key, value, cu_q, cu_k, max_q, max_k, *, is_causal=False: (
            query,
            {"is_causal": is_causal, "sizes": (max_q, max_k)},
        ),
        lambda query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1): (
            query,
            {"scale": scale, "window_size": window_size, "sizes": (max_q, max_k)},
        ),
    ],
    ids=["torch without scale", "torch with windows"],
)
def test_speaks_to_the_kernel_of_either_torch(signature, monkeypatch):
    """The keyword arguments of ``varlen_attn`` differ between torch's versions: causal and scaled either way."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", signature)
    variable_length_kernel.cache_clear()
    try:
        kernel = variable_length_kernel()
        query = torch.randn(5, 2, 16)
        bounds = segment_bounds((2, 3), torch.device("cpu"))
        got, given = kernel(query, query, query, bounds, bounds, 3, 4, 0.5)
        assert given.pop("sizes") == (3, 4)
        if "is_causal" in given:
            assert given == {"is_causal": True}
            torch.testing.assert_close(got, query * 0.5 * 4)  # the kernel divides by sqrt(16)
        else:
            assert given == {"scale": 0.5, "window_size": (-1, 0)}
            assert got is query
    finally:
        variable_length_kernel.cache_clear()


# ---------------------------------------------------------------- inside a model


def loss_and_gradients(model, batch, **options):
    enable_cal(model.train(), CALOptions(**options))
    output = model(**batch)
    output.loss.backward()
    return output, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_like_padded(change, calls, checkpoint=False):
    """A model whose attention was changed, padding-free, against a plain padded one."""
    found = []
    for padding_free in (False, True):
        model, image_tokens, pixels = build("llava")
        batch = batch_of(MIXED, image_tokens, pixels)
        if padding_free:
            change(model)
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(loss_and_gradients(model, batch, padding_free=padding_free))
    (padded, expected), (packed, gradients) = found
    assert packed.cal.main_tokens == int(batch["attention_mask"].sum())
    assert len(calls) == 3 * (3 if checkpoint else 2), "every layer of both passes, and the recomputation"
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        atol = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradients[name], gradient, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("checkpoint", [False, True])
def test_both_passes_go_through_the_kernel(monkeypatch, checkpoint):
    calls = []
    monkeypatch.setattr(segments, "suits_the_kernel", lambda *_: True)
    monkeypatch.setattr(segments, "variable_length_kernel", lambda: fake_kernel(calls))
    assert_like_padded(lambda model: None, calls, checkpoint)


def test_flash_attention_is_told_the_bounds(monkeypatch):
    """FlashAttention takes no dense mask: packed rows reach it as cumulative lengths, through the decoder's arguments."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def attention(module, query, key, value, attention_mask, scaling=None, **given):
        assert attention_mask is None
        groups = query.shape[1] // key.shape[1]
        flat = [
            one[0].transpose(0, 1)
            for one in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
        ]
        assert torch.equal(given["cu_seq_lens_q"], given["cu_seq_lens_k"])
        assert given["max_length_q"] == given["max_length_k"]
        bounds, longest = given["cu_seq_lens_q"], given["max_length_q"]
        out = fake_kernel(calls)(*flat, bounds, bounds, longest, longest, scaling)
        return out[None], None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", attention)

    def change(model):
        model.model.language_model.config._attn_implementation = "flash_attention_2"

    assert_like_padded(change, calls)
