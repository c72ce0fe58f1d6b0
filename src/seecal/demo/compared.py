"""What ``seecal demo --compare`` prints: differences with their intervals, the tokens, and no more than they show."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from . import emoji
from .files import Asked
from .measure import Measured
from .paired import Difference, paired
from .report import SPLITS, commonest_share
from .state import DemoOptions

ARMS = ("cal", "uniform")
Key = tuple[str, str]  # (split, question)
FIRST = (emoji.HELD_IMAGE, "kind", "right")  # what is judged, chosen before any training
_SMALL = 1.05  # times: weights that differ less than this leave plain training


@dataclass(frozen=True)
class Row:
    """A difference: of which questions, and of what ("right" answers, nats a "word" token, nats a "filler" token)."""

    split: str
    question: str
    what: str
    found: Difference

    @property
    def called(self) -> str:
        asked = {"describe": "description"}.get(self.question, self.question)
        kind = {"right": "right", "word": "nats a word token", "filler": "nats a filler token"}[self.what]
        return f"{asked}, {kind}"


@dataclass(frozen=True)
class Tokens:
    """Means over words of the image, and over filler: how many tokens, Δ in logits, weight by CAL."""

    words: int
    filler: int
    word_delta: float
    filler_delta: float
    word_weight: float
    filler_weight: float


@dataclass(frozen=True)
class Compared:
    """What there is to say. ``tokens``: before stage 2 ("stage-1") and after it ("cal")."""

    options: DemoOptions
    machine: str
    seconds: float
    steps: int
    before: Mapping[Key, Measured]
    rows: Sequence[Row]
    tokens: Mapping[str, Tokens]
    asked: Asked
    items: Sequence[emoji.Emoji]
    page: Path

    def told(self) -> dict[str, Any]:
        """As ``compare.json`` has it."""
        rows = [
            {"split": row.split, "question": row.question, "what": row.what, **asdict(row.found)} for row in self.rows
        ]
        figures = [
            {name: None if value != value else value for name, value in row.items()} for row in rows
        ]  # no nan in JSON
        tokens = {name: asdict(one) for name, one in self.tokens.items()}
        return {"seeds": self.options.seeds, "tune_steps": self.steps, "rows": figures, "tokens": tokens}

    def drawings(self, split: str) -> int:
        return len(self.asked[split, "kind"])


# ---- Figures ----


def differences(arms: Mapping[str, Sequence[Mapping[Key, Measured]]]) -> list[Row]:
    """CAL minus plain of all that is measured. ``arms``: of either arm a measurement a seed."""
    found = []
    for split in SPLITS:
        for question, what in (
            ("kind", "right"),
            ("kind", "word"),
            ("name", "right"),
            ("name", "word"),
            ("describe", "word"),
            ("describe", "filler"),
        ):
            values = [np.array([_values(one[split, question], what) for one in arms[arm]]) for arm in ARMS]
            found.append(Row(split, question, what, paired(values[0], values[1])))
    return found


def _values(measured: Measured, what: str) -> np.ndarray:
    """[n] of the questions."""
    if what == "right":
        return measured.exact
    nats, tokens = (measured.word_nll, measured.words) if what == "word" else (measured.filler_nll, measured.filler)
    return nats / np.maximum(tokens, 1)


def token_figures(scores: Iterable[Any], described: Mapping[str, emoji.Answer]) -> Tokens:
    """Means over the tokens of the scored descriptions (record id -> description)."""
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for record in scores:
        marks = np.array([seen for text, seen in described[record.record].pieces for _ in text] + [False])
        stop = np.asarray(record.columns["stop"])
        # The end of the turn has no characters of the answer
        last = np.where(stop > np.asarray(record.columns["start"]), stop - 1, len(marks) - 1)
        columns.append((marks[np.minimum(last, len(marks) - 1)], record.columns["delta"], record.columns["weight"]))
    seen, delta, weight = (np.concatenate(one) for one in zip(*columns, strict=True))
    means = [float(values[which].mean()) for values in (delta, weight) for which in (seen, ~seen)]
    return Tokens(int(seen.sum()), int((~seen).sum()), *means)


# ---- The report ----


def report(found: Compared, console: Console) -> None:
    """Differences, tokens, what they show, where everything is."""
    console.print()
    console.print(difference_table(found))
    console.print()
    console.print(token_table(found))
    console.print()
    for sentence in sentences(found):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{found.seconds / 60:.1f} minutes on {found.machine}.", highlight=False, soft_wrap=True)
    for what, path in (
        ("Models and processors", f"{found.options.out}/cal-0/final, {found.options.out}/uniform-0/final"),
        ("All figures", f"{found.options.out}/compare.json"),
        ("Page to look at, tokens by the plain model (A) and CAL's (B)", found.page),
    ):
        console.print(f"{what}: {path}", highlight=False, markup=False, soft_wrap=True)
    console.print("Next:", style="bold")
    for command in next_commands(found):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def difference_table(found: Compared) -> Table:
    """A row a set of questions; stage 1 is the model that both arms start from."""
    guessed = "; ".join(
        f"{name.split()[1]} {found.drawings(split)}, {commonest_share(found.items, 'kind', _answers(found, split)):.0%}"
        for split, name in SPLITS.items()
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Held out: CAL and plain training, {found.steps} steps each from one stage 1",
        caption="right: exact answers; nats: loss a token in words of the image; filler: nats a\n"
        f"token of the rest of the text. How many, commonest kind right: {guessed}",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "stage 1", "plain", "CAL", "CAL−plain", "95 % interval"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in found.rows:
        before = float(_values(found.before[row.split, row.question], row.what).mean())
        asked = "text" if row.question == "describe" else row.question
        kind = {"right": "right", "word": "nats", "filler": "filler"}[row.what]
        name = f"{SPLITS[row.split].split()[1]} {asked} {kind}"
        table.add_row(name, _figure(before, row.what), *_cells(row))
    return table


def token_table(found: Compared) -> Table:
    """Words of the image and filler of the held-out descriptions: CAL's weights, and what either arm has learnt of them."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Tokens of true descriptions: Δ and CAL's weight (plain: 1)",
        caption="Δ and weights: means of what is on the page; nats: of all",
        title_justify="left",
        caption_justify="left",
    )
    columns = ("", "tokens", "Δ, weight\nstage 1", "Δ, weight\nCAL", "nats\nplain", "nats\nCAL")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for kind, number, name in (("word", "words", "of the image"), ("filler", "filler", "filler")):
        of_kind = [row.found for row in found.rows if (row.question, row.what) == ("describe", kind)]
        nats = (sum(one.second for one in of_kind), sum(one.first for one in of_kind))
        table.add_row(
            name,
            str(getattr(found.tokens["stage-1"], number)),
            *(
                f"{getattr(one, f'{kind}_delta'):+.2f} {getattr(one, f'{kind}_weight'):.2f}"
                for one in (found.tokens["stage-1"], found.tokens["cal"])
            ),
            *(f"{value / len(of_kind):.2f}" for value in nats),
        )
    return table


def _answers(found: Compared, split: str) -> list[emoji.Answer]:
    return [answer for _, answer in found.asked[split, "kind"]]


def _figure(value: float, what: str) -> str:
    return f"{value:.0%}" if what == "right" else f"{value:.2f}"


def _cells(row: Row) -> list[str]:
    """Plain, CAL, the difference, its interval."""
    one, what = row.found, row.what
    return [_figure(one.second, what), _figure(one.first, what), _signed(one.mean, what), interval(row)]


def _signed(value: float, what: str) -> str:
    if what == "right":
        return f"{100 * value:+.1f}".replace("-", "−")
    return f"{value:+.3f}".replace("-", "−")


def interval(row: Row) -> str:
    """ "−0.10 to +0.02"; points of a hundred for right answers."""
    if np.isnan(row.found.low):
        return "none"
    if row.found.low == row.found.high == 0:
        return "no item differs"
    return f"{_signed(row.found.low, row.what)} to {_signed(row.found.high, row.what)}"


# ---- What it says ----


def sentences(found: Compared) -> list[str]:
    """What the intervals allow to say, and nothing else."""
    seeds = found.options.seeds
    if seeds == 1:
        about = (
            "One training of either arm: the intervals are over held-out drawings alone. They compare these two models and "
            "say nothing of other trainings; --seeds 5 would."
        )
    else:
        about = f"{seeds} trainings of either arm: the intervals are over trainings and held-out drawings."
    return [about, _judged(found), _others(found), _weights(found.tokens["stage-1"])]


def _judged(found: Compared) -> str:
    """On the one figure that was chosen before any training."""
    (row,) = (row for row in found.rows if (row.split, row.question, row.what) == FIRST)
    one, guess = row.found, commonest_share(found.items, "kind", _answers(found, row.split))
    said = (
        f"Judged on right kinds of unseen drawings: CAL {one.first:.0%}, plain {one.second:.0%}, "
        f"{_signed(one.mean, 'right')} points ({interval(row)})."
    )
    if max(one.first, one.second) <= guess:
        return f"{said} Neither is above the commonest answer's {guess:.0%}: too little training to compare anything."
    if not one.verdict:
        return f"{said} This does not tell them apart."
    which = "more" if one.verdict > 0 else "fewer"
    scope = "than the plain one" if found.options.seeds == 1 else "than plain training"
    subject = "This CAL model answers" if found.options.seeds == 1 else "Here CAL answers"
    return f"{said} {subject} {which} of them right {scope}."


def _others(found: Compared) -> str:
    """On all other figures together."""
    others = [row for row in found.rows if (row.split, row.question, row.what) != FIRST]
    clear = [row for row in others if row.found.verdict]
    count, have = len(clear) or "none", "have" if len(clear) > 1 else "has"
    begin = f"Of the {len(others)} other differences {count} {have} an interval"
    if not clear:
        return f"{begin} without zero."
    named = "; ".join(
        f"{SPLITS[row.split]}: {row.called}, CAL {'higher' if row.found.verdict > 0 else 'lower'}" for row in clear
    )
    by_chance = "One in twenty would have by chance, and they are not independent"
    return f"{begin} without zero ({named}; of nats lower is better). {by_chance}."


def _weights(first: Tokens) -> str:
    """On how far CAL was another training at all when it began."""
    ratio = first.word_weight / first.filler_weight
    said = f"When stage 2 began CAL weighed words of the image {ratio:.2f} times as much as filler"
    if ratio >= _SMALL:
        return f"{said}."
    if ratio > 1 / _SMALL:
        return f"{said}: nearly plain training."
    return f"{said}: not what it is for."


def next_commands(found: Compared) -> list[str]:
    """More seeds, the page's own command, one arm again."""
    options, out = found.options, str(found.options.out)
    more = replace(
        options, out=Path(f"{out}-seeds"), seeds=max(5, options.seeds + 3), minutes=options.minutes * 4, steps=None
    )
    cal, plain = (shlex.quote(f"{out}/scores/{name}") for name in ("cal", "uniform"))
    page, recipe = shlex.quote(str(found.page)), shlex.quote(f"{out}/cal-0.yaml")
    return [
        more.command(),
        f"seecal report {plain} {cal} --out {page}",
        f"seecal train --config {recipe} --output_dir {shlex.quote(f'{out}/mine')}",
    ]
