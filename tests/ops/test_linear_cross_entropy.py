"""weighted_linear_cross_entropy against a float64 oracle, and what it holds in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seecal import weighted_linear_cross_entropy
from seecal.ops.linear_cross_entropy import label_logits, weighted_sum_of_ce

N, D, V = 37, 16, 53


def naive(hidden, weight, labels, token_weights, bias=None, scale=1.0, softcap=None, weight_sum=None):
    """The lines that the op replaces."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    counted = token_weights * (labels != -100)
    return (counted * ce).sum() / (counted.sum() if weight_sum is None else weight_sum)


def inputs(rows=N, bias=True, ignored=0, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) * spread  # noqa: E731
    hidden, weight = draw(rows, D), draw(V, D) / D**0.5
    labels = torch.randint(V, (rows,), generator=generator)
    labels[:ignored] = -100
    token_weights = torch.rand(rows, generator=generator, dtype=torch.float64) * 4 + 1
    return hidden, weight, labels, token_weights, draw(V) if bias else None


def gradients(function, hidden, weight, labels, token_weights, bias, dtype, **options):
    leaves = [
        None if leaf is None else leaf.detach().clone().to(dtype).requires_grad_() for leaf in (hidden, weight, bias)
    ]
    loss = function(leaves[0], leaves[1], labels, token_weights.to(torch.float32), bias=leaves[2], **options)
    loss.backward()
    return [loss.detach().double(), *(None if leaf is None else leaf.grad.double() for leaf in leaves)]


def oracle(hidden, weight, labels, token_weights, bias, **options):
    return gradients(naive, hidden, weight, labels, token_weights, bias, torch.float64, **options)


CASES = {
    "plain": {},
    "bias": {"bias": True},
    "ignored rows": {"bias": True, "ignored": 9},
    "one row": {"rows": 1, "bias": True},
    "one row left": {"rows": 5, "ignored": 4},
    "soft-cap": {"softcap": 3.0, "bias": True},
    "scale": {"scale": 0.25, "bias": True},
    "soft-cap and scale": {"softcap": 5.0, "scale": 1.7, "bias": True, "ignored": 3},
    "weight sum of all ranks": {"weight_sum": 1234.5},
}


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 36, 37, 1000])
@pytest.mark.parametrize("case", CASES)
def test_float64_oracle(case, chunk_size):
    options = dict(CASES[case])
    tensors = inputs(options.pop("rows", N), options.pop("bias", False), options.pop("ignored", 0))
    got = gradients(weighted_linear_cross_entropy, *tensors, torch.float32, chunk_size=chunk_size, **options)
    for ours, truth in zip(got, oracle(*tensors, **options), strict=True):
        if truth is None:
            assert ours is None
        else:
            assert (ours - truth).norm() <= 2e-6 * truth.norm() + 1e-9


@pytest.fixture
def new_memory_is_nan():
    """What nobody writes then shows, instead of holding by chance what lay there before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize("vocabulary", [8192, 8193, 20_000])
def test_a_vocabulary_of_more_rows_than_one_slice(vocabulary):
    """The gradient of the head is scaled a slice of rows at a time: each of them must be written."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, D, generator=generator, dtype=torch.float64) / 4
    labels = torch.tensor([0, vocabulary - 1, 8191, vocabulary // 2, vocabulary - 2, 1])
    tensors = (hidden, weight, labels, torch.ones(6, dtype=torch.float64), None)
    got = gradients(weighted_linear_cross_entropy, *tensors, torch.float32)
    truth = oracle(*tensors)
    assert (got[2] - truth[2]).abs().max() <= 2e-6 * truth[2].abs().max()


@pytest.mark.parametrize("rows", [4095, 4096, 4097, 9000])
def test_label_logits_of_more_rows_than_one_slice(rows):
    hidden, weight, labels, _, bias = inputs(rows, ignored=0)
    got = label_logits(hidden.float(), weight.float(), labels, bias=bias.float(), scale=0.5, softcap=4.0)
    expected = 4.0 * torch.tanh(((hidden * weight[labels]).sum(-1) + bias[labels]) * 0.5 / 4.0)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_many_chunks_in_bfloat16_add_up_in_float32():
    """64 chunks summed in bfloat16 would lose half of the digits of the head's gradient."""
    hidden, weight, labels, token_weights, _ = inputs(512, bias=False)
    hidden, weight = hidden.to(torch.bfloat16).double(), weight.to(torch.bfloat16).double()
    tensors = (hidden, weight, labels, token_weights, None)
    truth = oracle(*tensors)[2]
    errors = [
        (gradients(weighted_linear_cross_entropy, *tensors, torch.bfloat16, chunk_size=rows)[2] - truth).norm()
        for rows in (512, 8)
    ]
    assert errors[1] <= 1.3 * errors[0], errors


@pytest.mark.parametrize("why", ["no row", "all ignored", "weights are zero", "weight_sum is zero"])
def test_nothing_to_learn_is_a_zero_with_gradients(why):
    hidden, weight, labels, token_weights, bias = (
        tensor.clone() for tensor in inputs(0 if why == "no row" else 4, True, 4 if why == "all ignored" else 0)
    )
    leaves = [tensor.float().requires_grad_() for tensor in (hidden, weight, bias)]
    scaled = token_weights.float() * (0 if why == "weights are zero" else 1)
    total = torch.zeros(()) if why == "weight_sum is zero" else None
    loss = weighted_linear_cross_entropy(leaves[0], leaves[1], labels, scaled, bias=leaves[2], weight_sum=total)
    loss.backward()
    assert float(loss.detach()) == 0
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
@pytest.mark.parametrize("options", [{}, {"scale": -0.5}, {"softcap": 3.0}], ids=["plain", "scale", "soft-cap"])
def test_is_top1_says_where_the_label_is_the_likeliest(chunk_size, options):
    hidden, weight, labels, token_weights, bias = inputs(ignored=4)
    bias[0] = bias.sum().abs()  # an ignored row would find its label, as id 0, the likeliest
    logits = options.get("scale", 1.0) * (hidden @ weight.T + bias)
    labels[::3] = logits.argmax(-1)[::3]
    labels[:4] = -100
    is_top1 = torch.zeros(N, dtype=torch.bool)
    arguments = (hidden, weight, labels, token_weights)
    loss, ce = weighted_sum_of_ce(*arguments, bias=bias, chunk_size=chunk_size, is_top1=is_top1, **options)
    assert torch.equal(is_top1, logits.argmax(-1) == labels)
    assert 8 < is_top1.sum() < N
    without = weighted_sum_of_ce(*arguments, bias=bias, chunk_size=chunk_size, **options)
    assert torch.equal(loss, without[0])
    assert torch.equal(ce, without[1])


def test_ignored_rows_may_hold_anything():
    hidden, weight, labels, token_weights, _ = inputs(6, ignored=2)
    hidden[:2] = float("nan")
    got = gradients(weighted_linear_cross_entropy, hidden, weight, labels, token_weights, None, torch.float32)
    truth = oracle(hidden[2:], weight, labels[2:], token_weights[2:], None)
    torch.testing.assert_close(got[0], truth[0], atol=0, rtol=1e-6)
    torch.testing.assert_close(got[1][2:], truth[1], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(got[2], truth[2], atol=1e-7, rtol=1e-5)
    assert not got[1][:2].any()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5}], ids=["plain", "softcap"])
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_bf16_is_within_the_error_budget_of_the_naive_bf16(chunk_size, options):
    """Against the float64 truth of the same bf16 inputs, our error may not exceed the naive bf16 version's.

    Summed over seeds, so that the luck of one rounding does not decide.
    """
    errors = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(8):
        hidden, weight, labels, token_weights, bias = inputs(N, True, 3, seed)
        hidden, weight, bias = (tensor.to(torch.bfloat16).double() for tensor in (hidden, weight, bias))
        tensors = (hidden, weight, labels, token_weights, bias)
        truth = oracle(*tensors, **options)
        ours = gradients(weighted_linear_cross_entropy, *tensors, torch.bfloat16, chunk_size=chunk_size, **options)
        plain = gradients(naive, *tensors, torch.bfloat16, **options)
        for row, result in enumerate((ours, plain)):
            errors[row] += torch.stack([(got - true).norm() for got, true in zip(result, truth, strict=True)])
    assert (errors[0] <= errors[1] * 1.05).all(), f"ours {errors[0].tolist()}, naive {errors[1].tolist()}"


def test_autocast_runs_in_its_dtype_and_keeps_float32_gradients():
    hidden, weight, labels, token_weights, _ = inputs()
    leaves = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = weighted_linear_cross_entropy(leaves[0], leaves[1], labels, token_weights)
    loss.backward()
    truth = oracle(hidden, weight, labels, token_weights, None)
    assert loss.dtype == torch.float32
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    assert (leaves[1].grad - truth[2]).norm() <= 2e-2 * truth[2].norm()
    assert (leaves[1].grad - truth[2]).norm() > 1e-5 * truth[2].norm(), "this ran in float32"


def test_fp16_neither_overflows_nor_underflows_where_the_mean_does_not():
    """A sum over 4,000 alike rows leaves float16's range; the mean, and its small entries under a loss scale, do not."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(4000, 8, generator=generator) + 20).half()
    weight = (0.01 * torch.randn(50, 8, generator=generator)).half()
    labels, token_weights = torch.zeros(4000, dtype=torch.long), torch.full((4000,), 5.0)
    truth = oracle(hidden.double(), weight.double(), labels, token_weights.double(), None)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    (weighted_linear_cross_entropy(*leaves, labels, token_weights) * 1024).backward()
    for leaf, true in zip(leaves, truth[1:3], strict=True):
        assert leaf.grad.isfinite().all()
        assert (leaf.grad.double() / 1024 - true).norm() <= 5e-3 * true.norm()


def test_bf16_gradients_have_no_common_scale_error():
    hidden, weight, labels, token_weights, _ = inputs(N)
    hidden, weight = (tensor.to(torch.bfloat16).double() for tensor in (hidden, weight))
    truth = oracle(hidden, weight, labels, token_weights, None)
    got = gradients(weighted_linear_cross_entropy, hidden, weight, labels, token_weights, None, torch.bfloat16)
    for ours, true in zip(got[1:3], truth[1:3], strict=True):
        assert abs(float((ours * true).sum() / (true * true).sum()) - 1) < 3e-4


def test_a_nan_weight_of_an_ignored_row_does_not_matter():
    hidden, weight, labels, token_weights, _ = inputs(6, ignored=2)
    expected = weighted_linear_cross_entropy(hidden, weight, labels, token_weights)
    token_weights[0] = float("nan")
    assert torch.equal(weighted_linear_cross_entropy(hidden, weight, labels, token_weights), expected)


def test_the_divisor_may_have_any_shape_of_one():
    hidden, weight, labels, token_weights, _ = inputs(6)
    got = [weighted_linear_cross_entropy(hidden, weight, labels, token_weights, weight_sum=one)
           for one in (3.0, torch.tensor(3.0), torch.tensor([3.0]))]  # fmt: skip
    assert all(one.shape == () and torch.equal(one, got[0]) for one in got)


class LargestLogits(TorchDispatchMode):
    """The most rows of any tensor made meanwhile whose last dimension is the vocabulary."""

    def __init__(self, allowed):
        super().__init__()
        self.rows, self.allowed = 0, allowed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and leaf.shape[-1] == V and not self.allowed(leaf):
                self.rows = max(self.rows, leaf.numel() // V)
        return out


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "bias": True}], ids=["plain", "softcap and bias"])
def test_never_more_rows_of_logits_than_the_chunk(options):
    rows, chunk = 4 * N, 7
    hidden, weight, labels, token_weights, bias = inputs(rows, options.pop("bias", False))
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    bias = None if bias is None else bias.float().requires_grad_()
    storage = weight.untyped_storage().data_ptr()
    mode = LargestLogits(lambda leaf: leaf.untyped_storage().data_ptr() == storage)
    with mode:
        loss = weighted_linear_cross_entropy(
            hidden, weight, labels, token_weights.float(), bias=bias, chunk_size=chunk, **options
        )
        loss.backward()
    assert mode.rows == chunk
    with LargestLogits(lambda leaf: leaf.untyped_storage().data_ptr() == storage) as mode:  # the test can fail
        naive(hidden, weight, labels, token_weights.float(), bias)
    assert mode.rows == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(V, D + 1)}, "same D"),
        ({"labels": torch.zeros(N + 1, dtype=torch.long)}, "one label"),
        ({"token_weights": torch.ones(N, 1)}, "one label"),
        ({"bias": torch.zeros(V + 1)}, "bias"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": -1}, "chunk_size=-1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    hidden, weight, labels, token_weights, bias = inputs()
    call = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "token_weights": token_weights,
        "bias": bias,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        weighted_linear_cross_entropy(**call)
