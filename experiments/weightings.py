"""Weightings of the experiments alone: a control, and one that changes while the model trains.

``CALOptions(weighting="experiments.weightings:shuffled")``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from seecal import WEIGHTINGS, CALOptions, VisualDelta

_CAL = WEIGHTINGS["cal"]


def shuffled(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """[N] CAL's weights, each at another label token of the batch: as spread as they are, without what they know.

    The order depends on the labels alone, so a run can be made again.
    """
    weights = _CAL(visual_delta, options)
    generator = torch.Generator().manual_seed(int(visual_delta.labels.double().dot(_places(weights)).item()))
    return weights[torch.randperm(len(weights), generator=generator).to(weights.device)]


def _places(weights: Tensor) -> Tensor:
    return torch.arange(1, len(weights) + 1, dtype=torch.float64, device=weights.device)


class Annealing(TrainerCallback):
    """Says how much of a training is done to :func:`annealed`; add it to the trainer's callbacks."""

    done = 0.0  # of the one training of this process, from 0 to 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        Annealing.done = state.global_step / max(state.max_steps, 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        Annealing.done = 0.0


def annealed(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """[N] CAL's weights with an alpha that falls in a line from the options' to 0 in the last step."""
    return _CAL(visual_delta, dataclasses.replace(options, alpha=options.alpha * (1 - Annealing.done)))
