"""``seecal calibrate``: α and β for a model, from where its Δ lies."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .read import read_scores
from .run import score
from .shards import Skipped

_PAPER = (1.0, 5.0)  # α and β


@dataclass(frozen=True)
class Calibration:
    """α and β that put given shares of the tokens at each, and how sure that is.

    Attributes:
        alpha, beta: in logits, not below 0.
        alpha_interval, beta_interval: 95 % of what other samples of as many records would have given (bootstrap).
        at_alpha, at_beta: the shares that were asked for: of tokens with Δ ≤ α, and with Δ ≥ β.
        shares: (of tokens with Δ ≤ 1, with Δ ≥ 5): where the paper's α and β lie on this model.
        records, tokens: those with an image that it was measured on.
        raised: the quantile asked for lies below 0, which a weight cannot: α is 0, and more tokens than asked lie at it.
        not_finite: label tokens whose Δ is no finite number, which are left out.
    """

    alpha: float
    beta: float
    alpha_interval: tuple[float, float]
    beta_interval: tuple[float, float]
    at_alpha: float
    at_beta: float
    shares: tuple[float, float]
    records: int
    tokens: int
    raised: bool
    not_finite: int = 0

    def yaml(self) -> str:
        """Lines for a recipe."""
        low, high = self.alpha_interval
        lines = [
            f"# {self.tokens} tokens of {self.records} records with images; intervals: 95 %, bootstrap over records",
            f"# the paper's alpha: 1, beta: 5 have {self.shares[0]:.0%} of them at alpha, {self.shares[1]:.0%} at beta",
            f"alpha: {self.alpha:.3g}  # {self.at_alpha:.0%} of the tokens at or below; {low:.3g} to {high:.3g}",
        ]
        if self.not_finite:
            lines.insert(1, f"# {self.not_finite} more tokens have no finite Δ, and are left out")
        if self.raised:
            lines[-1] += f". {self.at_alpha:.0%} lie below 0, where no weight can be"
        low, high = self.beta_interval
        lines.append(f"beta: {self.beta:.3g}  # {self.at_beta:.0%} of the tokens at or above; {low:.3g} to {high:.3g}")
        return "\n".join(lines)


def calibrate(
    model: Any = None,
    data: Any = None,
    *,
    scores: str | Path | None = None,
    at_alpha: float = 0.5,
    at_beta: float = 0.1,
    resamples: int = 200,
    seed: int = 0,
    **scoring: Any,
) -> Calibration:
    """α and β such that a share ``at_alpha`` of the tokens has Δ ≤ α, and ``at_beta`` has Δ ≥ β.

    The paper gives α and β for its own models and no shares, so the defaults of both are a rule of thumb, not the paper's.

    Args:
        model, data: what is scored for it, in a temporary folder; or, instead,
        scores: the folder of scores that are there already.
        at_alpha, at_beta: shares of the tokens that have an image before them.
        resamples: of the bootstrap, over records: tokens of one record are not independent.
        seed: of the bootstrap.
        scoring: more arguments of :func:`seecal.score`.

    Raises:
        ValueError: shares that leave nothing between α and β, no token with an image, or what :func:`seecal.score` raises.
    """
    if not (0 < at_alpha < 1 and 0 < at_beta < 1 and at_alpha + at_beta < 1):
        raise ValueError(f"at_alpha={at_alpha}, at_beta={at_beta}: expected shares above 0 that sum to less than 1")
    if (scores is None) == (model is None or data is None):
        raise ValueError("calibrate needs either model and data, or scores=... of a folder that seecal score wrote")
    if scores is not None:
        return _of_scores(scores, at_alpha, at_beta, resamples, seed)
    with tempfile.TemporaryDirectory(prefix="seecal-calibrate-") as folder:
        score(model, data, folder, **scoring)
        return _of_scores(folder, at_alpha, at_beta, resamples, seed)


def _of_scores(folder: str | Path, at_alpha: float, at_beta: float, resamples: int, seed: int) -> Calibration:
    parts, odd = [], 0
    for scored in read_scores(folder, ["has_contrast", "delta"]):
        if isinstance(scored, Skipped):
            continue
        of_record = scored.columns["delta"][scored.columns["has_contrast"].astype(bool)]
        finite = of_record[np.isfinite(of_record)]
        odd += len(of_record) - len(finite)
        if len(finite):
            parts.append(finite)
    if not parts and odd:
        raise ValueError(f"{folder}: none of its {odd} tokens with an image has a finite Δ. Look at the model.")
    if not parts:
        raise ValueError(
            f"{folder}: no token has an image before it, so Δ is 0 everywhere. Score data with images to calibrate on."
        )
    delta = np.concatenate(parts)
    record = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(delta, kind="stable")
    delta, record = delta[order], record[order]

    def bounds(times: Any) -> tuple[float, float]:
        """(α, β) of the data in which each record stands so many times."""
        below = np.cumsum(times[record])
        place = np.searchsorted(below, [at_alpha * below[-1], (1 - at_beta) * below[-1]])
        alpha, beta = (max(0.0, float(delta[min(index, len(delta) - 1)])) for index in place)
        return alpha, max(alpha, beta)

    rng = np.random.default_rng(seed)
    alpha, beta = bounds(np.ones(len(parts)))
    draws = [bounds(rng.multinomial(len(parts), [1 / len(parts)] * len(parts))) for _ in range(resamples)]
    alphas, betas = (tuple(map(float, np.quantile(draw, (0.025, 0.975)))) for draw in zip(*draws, strict=True))
    return Calibration(
        alpha,
        beta,
        alphas,  # type: ignore[arg-type]  # two numbers each
        betas,  # type: ignore[arg-type]
        at_alpha,
        at_beta,
        (float((delta <= _PAPER[0]).mean()), float((delta >= _PAPER[1]).mean())),
        len(parts),
        len(delta),
        bool(np.quantile(delta, at_alpha) < 0),
        odd,
    )
