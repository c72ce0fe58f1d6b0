"""Where tokens are logged to: one small function for each backend that can show them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..core.coloured import ColouredToken, coloured, in_markdown, legend, markdown_table, visible

# The names under which every backend has them.
ANSWER, DELTA, TABLE = "tokens/answer", "tokens/delta", "tokens/table"
_COLUMNS = ["token", "delta", "has_contrast"]
_STEP = "train/global_step"  # what transformers' callbacks plot against


@dataclass(frozen=True)
class LoggedTokens:
    """What one log holds.

    Attributes:
        step: optimizer steps done, 0 before the first.
        record: what errors call the record.
        answers: the label tokens of each of its answers.
    """

    step: int
    record: str
    answers: list[list[ColouredToken]]

    @property
    def tokens(self) -> list[ColouredToken]:
        return [token for answer in self.answers for token in answer]

    @property
    def deltas(self) -> np.ndarray:
        """Δ in logits of the tokens that have an image before them, without those that are not finite: [n] float64."""
        return np.array(
            [one.delta for one in self.tokens if one.has_contrast and math.isfinite(one.delta)], dtype=float
        )

    @property
    def html(self) -> str:
        """A page of its own, so that its encoding is known wherever it is shown."""
        lines = "".join(f"<p>{coloured(answer)}</p>" for answer in self.answers)
        head = f"<p>{visible(self.record)}, step {self.step}</p>"
        # Ink and paper of its own: dark themes give their frames neither
        body = f'<body style="background:#fff;color:#111;font-family:sans-serif">{head}{lines}{legend()}</body>'
        return f'<html><head><meta charset="utf-8"></head>{body}</html>'

    @property
    def markdown(self) -> str:
        head = f"{in_markdown(self.record)}, step {self.step}"
        return "\n\n".join([head, *map(markdown_table, self.answers)])


def _to_tensorboard(callback: Any, logged: LoggedTokens) -> None:
    writer = callback.tb_writer
    if writer is None:  # not on this rank
        return
    # TensorBoard takes styles out of HTML, and shows Markdown tables
    writer.add_text(ANSWER, logged.markdown, logged.step)
    if len(logged.deltas):
        writer.add_histogram(DELTA, logged.deltas, logged.step)
    writer.flush()


def _to_wandb(callback: Any, logged: LoggedTokens) -> None:
    wandb = importlib.import_module("wandb")
    rows = [[one.text, one.delta, one.has_contrast] for one in logged.tokens]
    entries = {ANSWER: wandb.Html(logged.html), TABLE: wandb.Table(columns=_COLUMNS, data=rows)}
    if len(logged.deltas):
        entries[DELTA] = wandb.Histogram(logged.deltas)
    wandb.log({**entries, _STEP: logged.step})


def _to_trackio(callback: Any, logged: LoggedTokens) -> None:
    trackio = importlib.import_module("trackio")
    # Its tables read text as Markdown
    rows = [[in_markdown(one.text), one.delta, one.has_contrast] for one in logged.tokens]
    made: dict[str, tuple[str, Callable[[Any], Any]]] = {
        ANSWER: ("Html", lambda kind: kind(logged.html)),
        TABLE: ("Table", lambda kind: kind(columns=_COLUMNS, data=rows)),
    }
    if len(logged.deltas):
        made[DELTA] = "Histogram", lambda kind: kind(logged.deltas)
    # Older ones have fewer of the kinds
    entries = {tag: make(getattr(trackio, kind)) for tag, (kind, make) in made.items() if hasattr(trackio, kind)}
    trackio.log({**entries, _STEP: logged.step})


# The name in report_to → (transformers' callback for it, how tokens are logged beside what that one logs).
BACKENDS: dict[str, tuple[type, Callable[[Any, LoggedTokens], None]]] = {
    "tensorboard": (TensorBoardCallback, _to_tensorboard),
    "trackio": (TrackioCallback, _to_trackio),
    "wandb": (WandbCallback, _to_wandb),
}


def backends_of(callbacks: Iterable[Any]) -> dict[str, Callable[[LoggedTokens], None]]:
    """Name → what logs to it, of the backends among a trainer's callbacks that can show tokens."""
    found: dict[str, Callable[[LoggedTokens], None]] = {}
    for callback in callbacks:
        for name, (kind, log) in BACKENDS.items():
            if isinstance(callback, kind):
                found[name] = lambda logged, log=log, callback=callback: log(callback, logged)  # type: ignore[misc]
    return found
