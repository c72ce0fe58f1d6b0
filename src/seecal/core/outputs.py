"""What the two passes measure (VisualDelta), and what a training forward leaves behind (CALOutput).

B rows of the batch, L columns, N label tokens (``labels[:, 1:] != -100``, row by row in batch order).
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .coloured import ColouredToken, coloured, legend

# What .tokens() shows, in this order, where it was measured.
_SHOWN = ("has_contrast", "delta", "logit_with", "logit_without", "logprob_with", "logprob_without")


@dataclass
class VisualDelta:
    """What the image changes at each of the N label tokens. All [N], detached; floats are float32, in logits.

    Attributes:
        delta: Δ, the label's logit (or log-probability, or probability, see ``CALOptions.delta``) with the image minus
            without it. 0 where ``has_contrast`` is False.
        labels: the label ids.
        sample: the row of the batch.
        position: the label's column, 1 or more.
        has_contrast: False for text-only samples, for labels before a sample's first image, and for a label directly
            after an image (it has no text predecessor); in training also everywhere with a weighting that does not read
            the pass without the image.
        logit_with, logit_without: the label's raw logit in either pass; where ``has_contrast`` is False both are the
            with-image one.
        logprob_with, logprob_without: the label's log-probability in either pass, in nats; each None unless the options
            ask for both or the weighting reads it.
        delta_grid: Δ on the whole grid [B, L-1], prompt and padding positions taken at vocabulary id 0; only for
            ``pool_scope="released"``.
    """

    delta: Tensor
    labels: Tensor
    sample: Tensor
    position: Tensor
    has_contrast: Tensor
    logit_with: Tensor | None = None
    logit_without: Tensor | None = None
    logprob_with: Tensor | None = None
    logprob_without: Tensor | None = None
    delta_grid: Tensor | None = None

    def __post_init__(self) -> None:
        self._texts: list[str] = []  # the tokens' texts, once .tokens() has been asked for them

    @property
    def runs(self) -> Tensor:
        """[N] int64: an id that changes when the sample changes or the position skips."""
        first = torch.ones_like(self.sample, dtype=torch.bool)
        first[1:] = (self.sample[1:] != self.sample[:-1]) | (self.position[1:] != self.position[:-1] + 1)
        return first.cumsum(0) - 1

    def tokens(self, tokenizer: Any) -> Any:
        """One row a label token: ``sample``, ``position``, ``token_id``, ``token`` (its text) and what was measured.

        From then on a notebook shows this object with words instead of ids.

        Args:
            tokenizer: of the model, or its processor.

        Returns:
            A pandas DataFrame; a list of dicts where pandas is not installed.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        ids = self.labels.tolist()
        self._texts = [tokenizer.decode([index]) for index in ids]
        columns = {"sample": self.sample.tolist(), "position": self.position.tolist()}
        columns |= {"token_id": ids, "token": self._texts}
        columns |= {name: getattr(self, name).tolist() for name in _SHOWN if getattr(self, name) is not None}
        if importlib.util.find_spec("pandas") is not None:
            return importlib.import_module("pandas").DataFrame(columns)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _repr_html_(self) -> str:
        """What a notebook shows: the label tokens of each sample, coloured by Δ."""
        ids = self.labels.tolist()
        texts = self._texts or [f"{index} " for index in ids]
        deltas, seen, samples = self.delta.tolist(), self.has_contrast.tolist(), self.sample.tolist()
        rows: dict[int, list[ColouredToken]] = {}
        for sample, text, delta, has_contrast in zip(samples, texts, deltas, seen, strict=True):
            rows.setdefault(sample, []).append(ColouredToken(text, delta, has_contrast))
        lines = [f"<p>sample {sample}: {coloured(tokens)}</p>" for sample, tokens in rows.items()]
        hint = "" if self._texts else "<p><small>token ids; call .tokens(tokenizer) once to see words</small></p>"
        return f"<div>{''.join(lines)}{legend()}{hint}</div>"

    def __len__(self) -> int:
        return len(self.delta)


@dataclass
class CALOutput:
    """What one CAL forward leaves behind in ``output.cal``. The tensors are this rank's and this micro-batch's own.

    Attributes:
        weights: w, [N] float32, detached, as the weighting gave them (not normalised).
        visual_delta: Δ and its two logits at the N label tokens.
        loss_sum: Σ w·CE in nats, scalar, carries gradients (for a caller that normalises by itself); detached with
            ``normalize="sample"``.
        weight_sum: Σ w, scalar, detached.
        cross_entropy: plain Σ CE / N in nats, scalar, detached; 0 without label tokens.
        aux_loss: the load-balancing loss of a mixture-of-experts decoder times its coefficient, scalar, carries gradients;
            None where there is none. It is in ``output.loss`` and not in ``loss_sum``.
        is_top1: whether no other token is likelier than the label, [N] bool; None unless CALTrainer counts it.
        token_losses: the plain cross-entropy of each label token, [N] float32, in nats, detached.
        main_tokens, contrast_tokens: token positions that went through the decoder in either pass, padding included.
    """

    weights: Tensor
    visual_delta: VisualDelta
    loss_sum: Tensor
    weight_sum: Tensor
    cross_entropy: Tensor
    main_tokens: int
    contrast_tokens: int
    aux_loss: Tensor | None = None
    is_top1: Tensor | None = None
    token_losses: Tensor | None = None
