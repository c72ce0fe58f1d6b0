"""How far the demo in a folder has come, in ``demo.json`` there: what it was asked for, what it has measured."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Found = dict[tuple[str, str], "Score"]  # (split, question) -> figures


@dataclass(frozen=True)
class DemoOptions:
    """What ``seecal demo`` can be told. Steps are optimizer steps of ``batch_size`` questions each.

    ``minutes`` of training and measuring; ``steps`` in both stages together takes its place. ``held_out``: drawings at most
    in each held-out measurement; None: as many as fit. ``compare``: stage 2 once with CAL and once plain, both from one
    stage 1, for each of ``seeds`` seeds from ``seed`` on; the steps are those of one arm with its stage 1.
    """

    out: Path = Path("seecal-demo")
    minutes: float = 5.0
    steps: int | None = None
    batch_size: int = 16
    held_out: int | None = None
    weighting: str = "cal"
    seed: int = 0
    compare: bool = False
    seeds: int = 1

    def asked(self) -> dict[str, Any]:
        """All but the folder."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "out"}

    def command(self) -> str:
        """The command line with these options."""
        words = ["seecal", "demo"]
        for name, value in dataclasses.asdict(self).items():
            if value != getattr(DemoOptions(), name):
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return shlex.join(words)


@dataclass(frozen=True)
class Score:
    """Figures of one set of questions: nats per word token, share of exact answers, questions, word tokens."""

    word_nll: float
    exact: float
    questions: int
    word_tokens: int


@dataclass
class State:
    """``bf16`` and ``machine``: how it computes here, None before that is known. ``seconds``: of all runs so far."""

    path: Path
    options: dict[str, Any]
    bf16: bool | None = None
    machine: str = ""
    seconds: float = 0.0
    scores: dict[str, Found] = field(default_factory=dict)

    def save(self) -> None:
        """Written under another name first: what is there is always whole."""
        scores = {
            when: {"/".join(key): dataclasses.astuple(score) for key, score in found.items()}
            for when, found in self.scores.items()
        }
        whole = {**{name: getattr(self, name) for name in ("options", "bf16", "machine", "seconds")}, "scores": scores}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1) + "\n", "utf8")
        part.replace(self.path)


def open_state(options: DemoOptions) -> State:
    """The state of the demo in ``options.out``: a new one, or the one to go on with.

    Raises:
        ValueError: a folder that is not the demo's, or a demo that was started with other options.
    """
    out, path = options.out, options.out / "demo.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: this is a file. Give a folder with --out.")
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out}: not made by the demo, which would write into it. Give another folder with --out.")
        out.mkdir(parents=True, exist_ok=True)
        state = State(path, options.asked())
        state.save()
        return state
    try:
        found = json.loads(path.read_text("utf8"))
        scores = {
            when: {_pair(key): Score(*score) for key, score in of_then.items()}
            for when, of_then in found.pop("scores").items()
        }
        state = State(path, scores=scores, **found)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: damaged, so how far this demo is is not known. Give another folder with --out."
        ) from None
    now = options.asked()
    changed = [name for name in now if state.options.get(name, getattr(DemoOptions(), name)) != now[name]]
    if changed:
        started = DemoOptions(out, **state.options).command()
        raise ValueError(
            f"{out}: the demo there was started with other options ({', '.join(changed)}). Go on with the same ones "
            f"({started}), or give another folder with --out."
        )
    return state


def _pair(key: str) -> tuple[str, str]:
    split, question = key.split("/")
    return split, question
