"""What the figures have to reach, and whether the CSVs of a folder say so. No torch here: it only reads.

A target without its figure waits; figures of a CPU count as none for a GPU's, and have limits of their own.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

Rows = dict[str, dict[str, str]]  # variant -> its row

# Shape -> the most that ours CAL may take of the model's own plain step, in time and in memory.
OF_HF = {"llava-1.5-7b": 1.00, "llava-next-7b": 1.00, "3b-152k": 0.92, "llava-1.5-7b-projector": 1.05}
MEMORY = {"llava-1.5-7b": 1.00, "llava-next-7b": 1.00, "3b-152k": 0.55, "llava-1.5-7b-projector": 1.00}
OF_TRL = 1.02  # of TRL's plain step, on every shape
ABOVE_FLOOR = 0.02  # how far ours CAL / ours MLE may lie above its floor, on every shape
WAITS = "waits for a GPU"
# On a CPU ours CAL may take this of the floor of ours CAL / hf, and that much more
OF_FLOOR_ON_CPU, MORE_ON_CPU = 1.02, 0.03
# What tables and pictures call the variants
LABELS = {
    "hf": "transformers, plain",
    "trl": "TRL SFT, plain",
    "liger": "Liger, plain",
    "released": "CAL as published",
    "mle": "ours, plain",
    "cal-padded": "ours CAL, padded",
    "cal": "ours CAL",
    "cal-fp8": "ours CAL, contrast in float8",
    "cal-every-4": "ours CAL, contrast every 4th step",
}


@dataclass(frozen=True)
class Verdict:
    """``measured`` is None where there is no figure."""

    target: str
    shape: str
    limit: float
    measured: float | None

    @property
    def word(self) -> str:
        if self.measured is None:
            return WAITS
        return "met" if self.measured <= self.limit else "missed"

    def row(self) -> dict[str, str]:
        shown = "" if self.measured is None else f"{self.measured:.3f}"
        return {
            "target": self.target, "shape": self.shape, "limit": f"{self.limit:.3f}", "measured": shown,
            "verdict": self.word,
        }  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where it is missing."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def on_gpu(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if not row["device"].startswith("cpu")]


def steps(folder: Path, shape: str) -> Rows:
    """The step benchmark's rows of this shape that a GPU gave."""
    return {row["variant"]: row for row in on_gpu(read(folder / f"step-{shape}.csv"))}


def cpu_limit(floor_of_hf: float) -> float:
    """The most that ours CAL may take of hf's step on a CPU."""
    return OF_FLOOR_ON_CPU * floor_of_hf + MORE_ON_CPU


def cpu_steps(folder: Path, shape: str) -> list[Rows]:
    """The step benchmark's rows of this shape, one set for each CSV that a CPU gave: step-SHAPE-cpu.csv and whatever
    else begins so, for a second kind of CPU."""
    found = []
    for path in sorted(folder.glob(f"step-{shape}-cpu*.csv"), key=lambda path: path.stem):
        rows = [row for row in read(path) if row["device"].startswith("cpu")]
        found += [{row["variant"]: row for row in rows}] if rows else []
    return found


def peak_gib(row: dict[str, str]) -> float | None:
    """All memory at the peak, weights included."""
    return (float(row["held_mib"]) + float(row["peak_mib"])) / 1024 if row.get("peak_mib") else None


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for shape, limit in OF_HF.items():
        rows = steps(folder, shape)
        found.append(Verdict("time: ours CAL / hf", shape, limit, _ratio(rows, "cal", "hf")))
        found.append(Verdict("time: ours CAL / TRL", shape, OF_TRL, _ratio(rows, "cal", "trl")))
        above = _ratio(rows, "cal", "mle")
        if above is not None:
            above -= float(rows["cal"]["floor_of_mle"])
        found.append(Verdict("time: ours CAL / ours MLE above the floor", shape, ABOVE_FLOOR, above))
        peaks = [peak_gib(rows[name]) if name in rows else None for name in ("cal", "hf")]
        ratio = peaks[0] / peaks[1] if peaks[0] and peaks[1] else None
        found.append(Verdict("peak memory: ours CAL / hf", shape, MEMORY[shape], ratio))
    return found


def _ratio(rows: Rows, one: str, other: str) -> float | None:
    times = [rows.get(name, {}).get("p50_ms") for name in (one, other)]
    return float(times[0]) / float(times[1]) if times[0] and times[1] else None
