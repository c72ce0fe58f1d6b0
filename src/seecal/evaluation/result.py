"""What an evaluation found: figures with their intervals, told in a table of one screen and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..verbosity import written_out

_LONGEST = 40  # characters of a model's name
_GROUPS = 16  # kinds of records in the table; the JSON has them all


@dataclass(frozen=True)
class Comparison:
    """The model against another one, on the records that both answered.

    Attributes:
        model: the other one.
        records: how many both answered.
        value: the other one's figure on them.
        difference: the model's figure on them less the other's.
        low, high: of the 95 % interval of the difference.
        p: two-sided, by the paired bootstrap.
    """

    model: str
    records: int
    value: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Evaluation:
    """What :func:`seecal.evaluate` found.

    Attributes:
        metric: its name.
        about: what it measures, and in which unit its figures are.
        model, data: their names.
        value: the figure.
        low, high: of its 95 % interval, by the bootstrap over records.
        records: how many have a score.
        bad: how many could not be asked.
        first_bad: why not, of the first 20.
        details: further figures by name, such as accuracies at thresholds.
        groups: of each kind of record (figure, how many).
        against: another model on the same records.
        folder: where the answers lie; None: nowhere.
        samples: of each record with a score: ``id``, ``prediction``, ``references``, ``score`` (before it is scaled).
    """

    metric: str
    about: str
    model: str
    data: str
    value: float
    low: float
    high: float
    records: int
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    details: dict[str, float] = field(default_factory=dict)
    groups: dict[str, tuple[float, int]] = field(default_factory=dict)
    against: Comparison | None = None
    folder: Path | None = None
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """All but the samples, for a file."""
        whole = asdict(self)
        del whole["samples"], whole["folder"]
        return whole

    def table(self, paper: Sequence[tuple[str, str, str]] = ()) -> Any:
        """A rich table: the figure, its parts, the other model.

        Args:
            paper: rows of the paper beside it: (system, baseline, with CAL).
        """
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("")
        for name in (self.metric, "95 % interval", "records"):
            table.add_column(name, justify="right")
        table.add_row(_end_of(self.model), _shown(self.value), _between(self.low, self.high), f"{self.records:,}")
        for name, value in self.details.items():
            table.add_row(f"  {written_out(name)}", _shown(value), "", "")
        for name, (value, count) in list(self.groups.items())[:_GROUPS]:
            table.add_row(f"  {written_out(name) or '(none)'}", _shown(value), "", f"{count:,}")
        if len(self.groups) > _GROUPS:
            table.add_row(f"  … {len(self.groups) - _GROUPS} more kinds", "", "", "")
        if self.against is not None:
            other = self.against
            table.add_row(_end_of(other.model), _shown(other.value), "", f"{other.records:,}")
            name = f"  difference, p = {other.p:.4f}"
            table.add_row(name, f"{other.difference:+.2f}", _between(other.low, other.high, "+"), f"{other.records:,}")
        for system, before, with_cal in paper:
            table.add_row(f"  paper: {system}", f"{before} → {with_cal}", "", "")
        return table

    def sentences(self) -> list[str]:
        """Lines around the table: what was measured, what could not be asked, where the answers lie."""
        lines = [f"{self.data}, {self.metric}: {self.about}"]
        if self.bad:
            lines.append(f"{self.bad:,} records could not be asked and have no score. The first: {self.first_bad[0]}")
        if self.folder is not None:
            lines.append(f"the answers: {self.folder}")
        return [written_out(line) for line in lines]


def _end_of(name: str) -> str:
    """A model's name, of a long path what tells it from others."""
    return written_out(name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}")


def _shown(value: float) -> str:
    return f"{value:.2f}"


def _between(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.2f} … {high:{sign}.2f}"
