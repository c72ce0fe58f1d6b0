"""The weighted cross-entropy of a linear head, in chunks of rows, so that [N, V] logits never exist.

N label tokens, D width of the hidden states, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..constants import IGNORE_INDEX

# Logits held at once when no chunk size is given: 2**25 float32 are 128 MiB.
CHUNK_LOGITS = 1 << 25
_HALF_LIFT = 256.0
_SCALED_ROWS = 8192


def weighted_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    weight_sum: Tensor | float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Σ w·CE / weight_sum of a linear head.

    Replaces::

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * torch.tanh(logits / softcap)
        ce = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        loss = (token_weights * ce).sum() / token_weights.sum()

    At most ``chunk_size`` rows of logits exist at a time, forward or backward. The gradients are computed in the forward
    (two matrix products a chunk) and only scaled in the backward. Under autocast the products run in its dtype.

    Args:
        hidden: [N, D], rows of the last hidden state that predict ``labels``.
        weight: [V, D], the head.
        labels: [N] int64; rows at -100 are ignored.
        token_weights: [N], ≥ 0; no gradient flows into them.
        bias: [V] or None.
        scale, softcap: what the model does to its logits, in this order; None: no cap.
        weight_sum: the divisor; None: Σ of ``token_weights`` over the rows that count.
        chunk_size: rows; None: as many as make about 2**25 logits.

    Returns:
        Scalar float32, in nats. With no row left, or a divisor of 0: a zero that still carries gradients.

    Raises:
        ValueError: shapes that do not fit together, or a chunk of less than one row.

    Source: written from the formula; the idea of computing gradients chunk by chunk in the forward is Liger-Kernel's.
    """
    _check_shapes(hidden, weight, labels, token_weights, bias)
    rows = token_weights.detach().float().masked_fill(labels == IGNORE_INDEX, 0)
    divisor = rows.sum() if weight_sum is None else torch.as_tensor(weight_sum, dtype=torch.float32).to(hidden.device)
    # Divided before the sum, so that the gradients, which keep the inputs' precision, are those of a mean.
    rows = rows * reciprocal_or_zero(divisor.reshape(()))
    return weighted_sum_of_ce(
        hidden, weight, labels, rows, bias=bias, scale=scale, softcap=softcap, chunk_size=chunk_size
    )[0]


def reciprocal_or_zero(divisor: Tensor) -> Tensor:
    """1 / divisor, and 0 where it is 0: an empty batch then gives a zero with gradients, without asking the device."""
    return torch.where(divisor == 0, torch.zeros_like(divisor), 1 / divisor.masked_fill(divisor == 0, 1))


def weighted_sum_of_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    is_top1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(Σ w·CE, a float32 scalar with gradients; CE of every row, [N] float32, detached, 0 where the label is -100).

    ``is_top1``, [N] bool, is filled in: whether no logit of the row is above its label's; False where that is -100. That is
    one more reduction over the logits, with every tie for the label.
    """
    _check_shapes(hidden, weight, labels, token_weights, bias)
    counts = labels != IGNORE_INDEX
    row_weight = token_weights.detach().float().masked_fill(~counts, 0)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: rows per chunk must be at least 1, or None")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        hidden = hidden.to(weight.dtype)
    rows = chunk_size or max(1, min(max(len(hidden), 1), CHUNK_LOGITS // weight.shape[0]))
    return _WeightedSumOfCE.apply(hidden, weight, bias, labels, row_weight, counts, scale, softcap, rows, is_top1)


def label_logits(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    """The logit of every row's own label: one dot product a row, no vocabulary projection. Without gradients.

    Replaces ``post(hidden @ weight.T + bias)[arange(N), labels]``. hidden [N, D], weight [V, D], labels [N] in [0, V);
    returns [N] float32. ``chunk_size`` bounds the float32 copies at chunk × D.
    """
    with torch.no_grad():
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            out[rows] = (hidden[rows].float() * weight[labels[rows]].float()).sum(-1)
        if bias is not None:
            out += bias[labels].float()
        return _post(out, scale, softcap)


def label_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The log-probability, in nats, of every row's own label. Without gradients.

    Replaces ``log_softmax(post(hidden @ weight.T + bias))[arange(N), labels]``, a chunk of rows at a time. hidden [N, D],
    weight [V, D], labels [N] in [0, V); returns [N] float32.
    """
    with torch.no_grad():
        nothing = torch.zeros(len(hidden), device=hidden.device)
        _, ce_N = weighted_sum_of_ce(
            hidden, weight, labels, nothing, bias=bias, scale=scale, softcap=softcap, chunk_size=chunk_size
        )
    return -ce_N


def _post(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What the model does to the raw head output; in place, the caller owns ``logits``."""
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, bias: Tensor | None) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    shapes += f", token_weights {tuple(token_weights.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{shapes}: expected hidden [N, D] and weight [V, D] with the same D")
    if labels.shape != hidden.shape[:1] or token_weights.shape != labels.shape:
        raise ValueError(f"{shapes}: expected one label and one token weight for each of the N rows of hidden")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{shapes}, bias {tuple(bias.shape)}: expected bias [V]")


class _WeightedSumOfCE(torch.autograd.Function):
    """(Σ w·CE, CE [N]). Only the first carries gradients, which the forward already computes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_weight: Tensor,
        counts: Tensor,
        scale: float,
        softcap: float | None,
        rows: int,
        is_top1: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # float16 has few exponents: gradients of a mean are lifted into its range, and kept in float32 until the backward
        # brings the loss scale.
        half = hidden.dtype == torch.float16
        lift = _HALF_LIFT if half else 1.0
        # One chunk: its product is the gradient. Several: they are added up in float32.
        one_chunk = len(hidden) <= rows and not half
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32 if half else None) if need_hidden else None
        grad_weight = _zeros(weight, weight.dtype if one_chunk else torch.float32) if need_weight else None
        grad_bias = _zeros(bias, torch.float32) if need_bias and bias is not None else None
        ce_N = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                # What stands in an ignored row must not matter, not even a NaN.
                hidden_CD = hidden[part].masked_fill(~counts[part, None], 0)
                label_C1 = labels[part].masked_fill(~counts[part], 0)[:, None]
                logits_CV = hidden_CD @ weight.t()
                logits_CV = logits_CV.float() if bias is None else logits_CV.float().add_(bias.float())
                _post(logits_CV, scale, softcap)
                lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
                at_label_C1 = logits_CV.gather(1, label_C1)
                ce_N[part] = (lse_C1 - at_label_C1)[:, 0] * counts[part]
                if is_top1 is not None:
                    is_top1[part] = (at_label_C1[:, 0] >= logits_CV.amax(-1)) & counts[part]
                if not (need_hidden or need_weight or grad_bias is not None):
                    continue
                _logit_gradient_(logits_CV, lse_C1, label_C1, row_weight[part, None] * lift, scale, softcap)
                if grad_bias is not None:
                    grad_bias += logits_CV.sum(0)
                grad_CV = logits_CV.to(hidden.dtype)
                if grad_hidden is not None and not half:
                    torch.mm(grad_CV, weight, out=grad_hidden[part])
                elif grad_hidden is not None:
                    grad_hidden[part] = grad_CV @ weight
                if grad_weight is not None:
                    grad_weight += grad_CV.t() @ hidden_CD
        ctx.save_for_backward(
            grad_hidden,
            grad_weight if grad_weight is None or half else grad_weight.to(weight.dtype),
            grad_bias,
        )
        ctx.lift, ctx.dtypes = lift, [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(ce_N)
        return (row_weight * ce_N).sum(), ce_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        by = grad_outputs[0].float() / ctx.lift
        grads = (
            None if grad is None else _scaled(grad, by, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, *[None] * 7)


def _logit_gradient_(
    logits_CV: Tensor, lse_C1: Tensor, label_C1: Tensor, weight_C1: Tensor, scale: float, softcap: float | None
) -> None:
    """Turns logits into d(Σ w·CE)/d(head output) in place: w · scale · (softmax − onehot) · (1 − (z/cap)²)."""
    # d tanh: taken before the logits are overwritten; it is the only second [C, V] tensor, and only with a cap.
    slope_CV = None if softcap is None else 1 - (logits_CV / softcap) ** 2
    logits_CV.sub_(lse_C1).exp_()
    logits_CV.scatter_add_(1, label_C1, torch.full_like(lse_C1, -1.0))
    logits_CV.mul_(weight_C1 * scale)
    if slope_CV is not None:
        logits_CV.mul_(slope_CV)


def _scaled(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · by, multiplied in float32 a slice at a time and rounded once."""
    out = torch.empty_like(grad, dtype=dtype)
    for start in range(0, len(grad), _SCALED_ROWS):
        rows = slice(start, start + _SCALED_ROWS)
        out[rows] = grad[rows].float() * by
    return out


def _zeros(like: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert like is not None
    return torch.zeros(like.shape, dtype=dtype, device=like.device)
