"""Δ → the weight of every label token. Read this file first: it is the method, the rest is how Δ is measured.

    w_j = mean over the window of clamp(Δ_j, alpha, beta)             L = Σ w_j · CE_j / Σ w_j

A weighting is any callable ``w(visual_delta, options) -> [N]`` with an attribute ``needs_logprob``; the name under which
it stands in ``WEIGHTINGS`` is what ``CALOptions(weighting=...)`` takes.

N label tokens, B rows, L columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import CALOptions, VisualDelta, check_window


def token_weights(delta: Tensor, runs: Tensor, alpha: float = 1.0, beta: float = 5.0, window: int = 3) -> Tensor:
    """CAL's weights: clamped Δ, averaged over neighbours inside a run of consecutive label tokens.

    Replaces, for every run r of label tokens::

        c = delta[r].clamp(alpha, beta)
        w[r] = [c[max(0, j - window // 2) : j + window // 2 + 1].mean() for j in range(len(c))]

    Args:
        delta: [N] logit differences, any float dtype.
        runs: [N] integers, ``VisualDelta.runs``; equal neighbours belong to one run.
        alpha, beta: clamp range, in logits.
        window: odd number of tokens. At the ends of a run the mean is over what is there, not over zeros.

    Returns:
        [N] float32, between alpha and beta.

    Raises:
        ValueError: shapes that differ, an even window, or not 0 <= alpha <= beta.

    Source: equations 3 to 5 of arXiv 2405.17871.
    """
    check_window(alpha, beta, window)
    if delta.ndim != 1 or delta.shape != runs.shape:
        raise ValueError(
            f"delta {tuple(delta.shape)} and runs {tuple(runs.shape)}: both must be [N], one entry a label token"
        )
    clamped = delta.detach().float().clamp(alpha, beta)
    total, count = clamped.clone(), torch.ones_like(clamped)
    for shift in range(1, min(window // 2, len(clamped) - 1) + 1):
        same = (runs[shift:] == runs[:-shift]).float()
        total[shift:] += same * clamped[:-shift]
        total[:-shift] += same * clamped[shift:]
        count[shift:] += same
        count[:-shift] += same
    return total / count


def _released_weights(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """The pooling of the paper's code: over the flattened batch, where each row's end touches the next row's start."""
    grid_BL = visual_delta.delta_grid
    assert grid_BL is not None, "pool_scope='released' is given Δ on the whole grid by the forward"
    flat = grid_BL.clamp(options.alpha, options.beta).reshape(1, 1, -1)
    pooled = torch.nn.functional.avg_pool1d(
        flat, options.window, stride=1, padding=options.window // 2, count_include_pad=False
    )
    return pooled.view_as(grid_BL)[visual_delta.sample, visual_delta.position - 1]


@dataclass(frozen=True)
class Weighting:
    """A named way from Δ to weights. ``source`` says where it was published."""

    function: Callable[[VisualDelta, CALOptions], Tensor]
    source: str
    needs_logprob: bool = False

    def __call__(self, visual_delta: VisualDelta, options: CALOptions) -> Tensor:
        """[N] float32 weights ≥ 0 for the N label tokens."""
        return self.function(visual_delta, options)


def _cal(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    if options.pool_scope == "released":
        return _released_weights(visual_delta, options)
    return token_weights(visual_delta.delta, visual_delta.runs, options.alpha, options.beta, options.window)


def _uniform(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    return torch.ones_like(visual_delta.delta)


def _dft(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """The token's own probability under the model that trains; Σ w normalises it like the others."""
    assert visual_delta.logprob_with is not None
    return visual_delta.logprob_with.exp()


WEIGHTINGS: dict[str, Weighting] = {
    "cal": Weighting(_cal, "arXiv 2405.17871"),
    "dft": Weighting(_dft, "Dynamic Fine-Tuning, arXiv 2508.05629", needs_logprob=True),
    "uniform": Weighting(_uniform, "maximum likelihood; the baseline"),
}


def weighting_named(name: str) -> Weighting:
    """The entry of ``WEIGHTINGS``, or ValueError with the names there are."""
    if name not in WEIGHTINGS:
        raise ValueError(f"weighting={name!r} is not in seecal.WEIGHTINGS; it has {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name]
