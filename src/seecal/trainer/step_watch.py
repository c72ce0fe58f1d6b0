"""What is not finite in an optimizer step: Δ, losses and weights of each micro-batch, then loss and gradient norm of all.

Nothing waits for the device before the step's end. There the ranks agree, so that all of them stop or none does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.outputs import CALOutput
from ..ops.distributed import max_over_ranks, sum_over_ranks, world_size
from .metrics import listed_records

# What is looked at in a forward, as errors call it
FORWARD = ("Δ", "loss", "weight")


@dataclass
class MicroBatch:
    """One micro-batch of the running step. Its inputs are held anyway: Trainer keeps those of a step until it ends.

    Attributes:
        number: its place in the step, from 1.
        records: how errors call its records, row by row; empty where the collator does not say.
        inputs: what the model was called with.
        random: the states of the random numbers before its forward: ``cpu`` and, on a GPU, ``cuda``.
        odd: name out of :data:`FORWARD` → at which of the N label tokens it is not finite, [N] bool.
        sample, position, labels: row, column and id of the label tokens, [N].
        aux_is_odd: whether the load-balancing loss is not finite, a bool scalar.
    """

    number: int
    records: Sequence[str]
    inputs: Mapping[str, Any]
    random: dict[str, Tensor]
    odd: dict[str, Tensor] = field(default_factory=dict)
    sample: Tensor | None = None
    position: Tensor | None = None
    labels: Tensor | None = None
    aux_is_odd: Tensor | None = None

    @torch.no_grad()
    def note(self, cal: CALOutput) -> None:
        """Keep what its forward gave, on the device."""
        delta, losses = cal.visual_delta, cal.token_losses
        odd = ~delta.delta.isfinite()
        if delta.logit_with is not None:
            odd |= ~delta.logit_with.isfinite()
        self.odd = {"Δ": odd, "weight": ~cal.weights.isfinite()}
        if losses is not None:
            self.odd["loss"] = ~losses.isfinite()
        self.sample, self.position, self.labels = delta.sample, delta.position, delta.labels
        self.aux_is_odd = None if cal.aux_loss is None else ~cal.aux_loss.detach().isfinite()

    def is_odd(self) -> Tensor:
        """Whether anything of its forward is not finite, a bool scalar on the device."""
        found = [one.any() for one in self.odd.values()]
        found += [] if self.aux_is_odd is None else [self.aux_is_odd]
        return torch.stack([one.to(found[0].device) for one in found]).any() if found else torch.tensor(False)

    def rows(self) -> list[int]:
        """The rows with a label token that is not finite; waits for the device."""
        if self.sample is None:
            return []
        # The mean over neighbouring weights carries a NaN over to the next record's
        measured = torch.stack([odd for name, odd in self.odd.items() if name != "weight"]).any(0)
        odd = torch.where(measured.any(), measured, self.odd["weight"])
        return sorted(set(self.sample[odd].tolist()))

    def suspects(self) -> list[str]:
        """The records that are not finite, or all of its records where no row is."""
        rows = [row for row in self.rows() if row < len(self.records)]
        return [self.records[row] for row in rows] or list(self.records)


class StepWatch:
    """The micro-batches of the running step on this rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.batches: list[MicroBatch] = []

    @property
    def records(self) -> list[str]:
        """How errors call the records of the step so far."""
        return [name for batch in self.batches for name in batch.records]

    def begin(self, inputs: Mapping[str, Any], records: Sequence[str]) -> MicroBatch:
        """One more micro-batch, before its forward."""
        random = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._device)
        batch = MicroBatch(len(self.batches) + 1, records, dict(inputs), random)
        self.batches.append(batch)
        return batch

    def clear(self) -> None:
        """The step has ended, or was begun anew."""
        self.batches = []

    def is_odd(self) -> Tensor:
        """Whether any forward of the step gave something that is not finite, a bool scalar on the device."""
        found = [batch.is_odd().to(self._device) for batch in self.batches]
        return torch.stack(found).any() if found else torch.tensor(False, device=self._device)


@dataclass(frozen=True)
class BadStep:
    """Why a step must not be taken; the ranks agree that it must not.

    Attributes:
        step: its number, from 1.
        loss, norm: of this rank's step, as far as it knows: nats, and the gradient norm.
        batches: the micro-batches of this rank to look at: those whose forward is not finite; all where no rank has one,
            and it was the gradients alone.
        of: how many the step has on this rank.
        ranks: those with a forward that is not finite.
    """

    step: int
    loss: float
    norm: float
    batches: list[MicroBatch]
    of: int
    ranks: list[int]

    def sentence(self) -> str:
        """What is not finite, and the records, in one line."""
        line = (
            f"step {self.step}: the loss is {self.loss:g} and the gradient norm {self.norm:g}. Stopped before the "
            "optimizer step; the weights are those of the step before."
        )
        if self.ranks and world_size() > 1:
            line += f" Not finite on rank {', '.join(map(str, self.ranks))}."
        for batch in self.batches if self.ranks else ():
            counts = {name: int(odd.sum()) for name, odd in batch.odd.items()}
            what = ", ".join(f"{name} at {count}" for name, count in counts.items() if count)
            where = f"micro-batch {batch.number} of {self.of}"
            found = f"{what} of {len(batch.labels)} label tokens" if what and batch.labels is not None else "its loss"
            line += f" {where}: not finite are {found}{listed_records(batch.suspects())}."
        if not self.ranks:
            names = [name for batch in self.batches for name in batch.records]
            line += f" Both passes are finite, the gradients are not{listed_records(names)}."
        return line


def bad_step(loss: Tensor, norm: Tensor, scaler: Any, step: int, watch: StepWatch) -> BadStep | None:
    """What is not finite in the step whose last backward is done; None where all is. Waits once for the device.

    On several ranks it is asked on all of them, and all get an answer or none does.

    Args:
        loss, norm: of the step.
        scaler: of an fp16 training, which skips a step whose gradients overflow; None without.
        step: its number, for the error.
        watch: the micro-batches of this rank.
    """
    norm = norm.detach().to(loss.device)
    odd = watch.is_odd().to(loss.device)
    flags = max_over_ranks(torch.stack([~loss.isfinite(), ~norm.isfinite(), odd]).float())
    values = torch.cat([torch.stack([loss.float(), norm.float()]), flags]).tolist()
    loss_is_odd, norm_is_odd, forward_is_odd = (value > 0 for value in values[2:])
    if not (loss_is_odd or norm_is_odd or forward_is_odd):
        return None
    if not (loss_is_odd or forward_is_odd) and scaler is not None:
        spent = torch.tensor(float(scaler.get_scale() < 1), device=loss.device)
        if not max_over_ranks(spent).item():
            return None  # fp16: the scaler skips this step and halves its scale
    of_ranks = torch.zeros(world_size(), device=loss.device)
    of_ranks[torch.distributed.get_rank() if world_size() > 1 else 0] = odd.float()
    ranks = [rank for rank, flag in enumerate(sum_over_ranks(of_ranks).tolist()) if flag]
    batches = [one for one in watch.batches if bool(one.is_odd())] if ranks else list(watch.batches)
    return BadStep(step, values[0], values[1], batches, len(watch.batches), ranks)
