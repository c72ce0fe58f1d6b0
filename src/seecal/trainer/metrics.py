"""What CALTrainer logs about tokens: sums that stay on the device while it trains, and the figures made of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.options import CALOptions
from ..core.outputs import CALOutput
from ..ops.distributed import max_over_ranks

logger = logging.getLogger(__name__)

# A share of the time that more workers would win back, in as many logs one after the other: one alone is a slow disk.
_HIGH_SHARE, _LOGS = 0.3, 3
# What Linux calls the memory of a process that is resident now, the part of it that no file backs, and the most that was
_MEMORY = {"resident": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}


class RunningSums:
    """Named sums that stay on the device until they are read. False while empty."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            value = value.detach().to(self._device, self._dtype) if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device, dtype=self._dtype)) + value

    def clear(self) -> None:
        self._sums = {}

    def numbers(self) -> dict[str, float]:
        """All sums of this rank, kept as they are; what :meth:`add` makes the same sums of again."""
        return {name: float(value) for name, value in self._sums.items()}

    def take(self, name: str) -> Tensor:
        """One sum of this rank; clears all."""
        value = self._sums[name]
        self.clear()
        return value

    def over_ranks(self, accelerator: Any) -> dict[str, Tensor]:
        """All sums, over all ranks (``accelerator`` None: this one's), still on the device; clears them."""
        names, values = list(self._sums), torch.stack(list(self._sums.values()))
        self.clear()
        values = values if accelerator is None else accelerator.reduce(values, "sum")
        return dict(zip(names, values.unbind(), strict=True))

    def read(self, accelerator: Any) -> dict[str, float]:
        """All sums, over all ranks, as numbers; clears them. Waits for the device once."""
        sums = self.over_ranks(accelerator)
        return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


@torch.no_grad()
def count_tokens(sums: RunningSums, cal: CALOutput, attention_mask: Tensor | None, options: CALOptions) -> None:
    """Adds one training forward to ``sums``, without waiting for the device."""
    seen, delta = cal.visual_delta.has_contrast, cal.visual_delta.delta
    labels = len(cal.visual_delta)
    sums.add(
        cross_entropy=cal.cross_entropy * labels,
        label_tokens=labels,
        seen=seen.sum(),
        delta=(delta * seen).sum(),
        at_alpha=((delta <= options.alpha) & seen).sum(),
        at_beta=((delta >= options.beta) & (delta > options.alpha) & seen).sum(),
        tokens=cal.main_tokens if attention_mask is None else attention_mask.sum(),
        main=cal.main_tokens,
        contrast=cal.contrast_tokens,
    )
    if cal.is_top1 is not None:
        sums.add(correct=cal.is_top1.sum())


def token_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The figures to log. Those about Δ are left out where no label token had a contrast."""
    metrics = {
        "cross_entropy": sums["cross_entropy"] / max(sums["label_tokens"], 1),
        "label_tokens": sums["label_tokens"],
        "contrast_token_share": sums["contrast"] / max(sums["main"] + sums["contrast"], 1),
    }
    if "correct" in sums:
        metrics["mean_token_accuracy"] = sums["correct"] / max(sums["label_tokens"], 1)
    if "aux_loss" in sums:
        metrics["aux_loss"] = sums["aux_loss"] / sums["forwards"]
    if "dropped" in sums:
        metrics |= {"records_dropped": sums["dropped"], "records_truncated": sums["truncated"]}
    if seen := sums["seen"]:
        at_alpha, at_beta = sums["at_alpha"] / seen, sums["at_beta"] / seen
        metrics |= {"delta_mean": sums["delta"] / seen, "share_at_alpha": at_alpha, "share_at_beta": at_beta}
        metrics["share_inside"] = 1 - at_alpha - at_beta
    return metrics


def evaluation_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The figures of an evaluation, in nats and shares a label token: means over all of its tokens, not over batches."""
    tokens = sums["tokens"]
    means = {"loss": "nll", "entropy": "entropy", "mean_token_accuracy": "correct"}
    metrics = {**{name: sums[summed] / tokens for name, summed in means.items()}, "label_tokens": tokens}
    if "aux_loss" in sums:
        metrics["aux_loss"] = sums["aux_loss"] / sums["forwards"]
    return metrics


def host_memory() -> dict[str, int]:
    """Bytes of this process in the host's memory: ``resident`` now, ``anonymous`` (of those, what is no page of a file as
    the mapped records are), ``peak``. Empty where the system does not tell them in /proc."""
    try:
        lines = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines()
        )
        return {name: int(lines[field].split()[0]) * 1024 for name, field in _MEMORY.items()}
    except (OSError, KeyError, ValueError):
        return {}


def memory_metrics(device: torch.device) -> dict[str, float]:
    """GiB of host memory to log, of the rank that has the most; none where the system does not tell. All ranks call it."""
    here = host_memory()
    values = torch.tensor([here.get("resident", 0), here.get("peak", 0)], dtype=torch.float32, device=device) / 2**30
    resident, peak = max_over_ranks(values).tolist()
    return {"host_memory_gib": resident, "host_memory_peak_gib": peak} if peak else {}


def listed_records(names: Sequence[str]) -> str:
    """`` (record 'a', record 'b')``, the first eight of them, for an error; nothing for none."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f" ({', '.join(names[:8])}{more})" if names else ""


class Waiting:
    """An iterator that adds up the ``seconds`` that its caller waits for the next item."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.seconds = 0.0

    def __iter__(self) -> Waiting:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.seconds += time.perf_counter() - start


class WaitHint:
    """Says once what to set when the training keeps waiting for its batches."""

    def __init__(self) -> None:
        self._high, self._said = 0, False

    def see(self, share: float, workers: int, decoding: str) -> None:
        """One more log: the share of its time spent waiting (0 to 1), and the two settings that it depends on."""
        self._high = self._high + 1 if share > _HIGH_SHARE else 0
        if self._high < _LOGS or self._said:
            return
        self._said = True
        remedy = "Set dataloader_num_workers to the CPU cores that are free" if workers == 0 else (
            f"Raise dataloader_num_workers (now {workers}) if CPU cores are free"
        )  # fmt: skip
        also = ", or set image_decoding='reduced'" if decoding == "exact" else ""
        logger.warning("%.0f %% of the training time is spent waiting for batches. %s%s.", 100 * share, remedy, also)
