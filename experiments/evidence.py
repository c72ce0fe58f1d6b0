"""Write docs/evidence.md, its pictures and the lines that the README quotes, from the rows of results:

    python -m experiments.evidence

A test keeps them in step. What is above chance, below it or a null is read off the intervals here, not written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .planted import AFTER_NAME, FILLER
from .rows import Rows
from .runner import pool
from .token_kinds import DESIGN, FIRST, LAST, LOGS, PLANS, SCORES
from .trials_page import of_trials, quoted, table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "evidence.md"
README = HERE.parent / "README.md"
MARKS = ("<!-- from docs/evidence.md -->", "<!-- end -->")
Row = dict[str, Any]
NAMES = {"delta": "Δ", "gain": "gain", "logprob_with": "log p with image", "logprob_without": "log p without"}
NAMES |= {score: score.replace("weight of ", "weight ") for score in SCORES if score not in NAMES}

INTRODUCTION = """\
# Evidence: what small experiments have shown

Written by `python -m experiments.evidence` from the rows in [experiments/results](../experiments/results); a test keeps the
two in step. What was expected stands in `experiments/NAME.yaml`, which is older in git than the rows. Nulls are shown like
the rest.

Everything here is about small models that two CPU cores can train: most have 1 to 4 million parameters and random weights
at first, the demo's has 140 million. Nothing here says how a large model behaves.
"""
DEMO_ALONE = """\
## One training of the demo's model

Each of the two sections below is about one training of one small model (`seecal demo`, 140 million parameters), and not
about the same one. Intervals are over its drawings, not over trainings, and nothing there compares CAL with plain training.

AUROC is the share of pairs in which the first of two is the higher one, 0.5 by chance. In brackets: 95 % intervals. An
interval without 0.5 is called above or below chance and stands in bold; with so many cells some are so by accident.
"""


DESIGNED = """\
In the first design the wrong words were other words than the right ones ("not a plant" against "a plant"), so a score
that only knows words, and never looks at the image, could tell them apart. Here every text stands beside drawings
that it fits and just as often (descriptions: twice as often) beside drawings that it does not fit. Whatever tells the
two apart has looked at the image.
"""
READING = """\
Gain is the difference of the log-probabilities. Without the image a text is the same wherever it stands: what log p
without differs by is rounding, and inside one text gain and log p with image give one order. The weighting `dft`
orders by log p with image, `prior` by log p without, upside down. Weights of `cal` and `negative` are means over
three tokens, and `vig` also reads the mean of the record, so theirs say something of the neighbours too, which is why
those of filler differ.
"""


def page(token_kinds: Sequence[Row], swapped: Sequence[Row], trained: Mapping[str, Row]) -> str:
    """The whole page, of the rows of all experiments; ``trained``: those of trainings, by key."""
    demo = [DEMO_ALONE, *of_token_kinds(token_kinds), *of_swapped_captions(swapped)]
    text = "\n".join([INTRODUCTION, *of_trials(trained), *demo])
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def readme(text: str, trained: Mapping[str, Row]) -> str:
    """The README with what it quotes of the page between its marks."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    if not after:
        raise ValueError(f"the README has no {' … '.join(MARKS)}: put the two lines where the page is to be quoted")
    lines = quoted(trained)
    return before + "\n".join([MARKS[0], *lines, *([""] if lines else []), MARKS[1]]) + after


def cell(interval: dict[str, float | None] | None) -> str:
    """An estimate with its interval, bold where 0.5 is outside."""
    if interval is None or interval["estimate"] is None:
        return "–"
    low, high = interval["low"], interval["high"]
    said = f"{interval['estimate']:.3f} ({low:.3f}–{high:.3f})"
    return said if verdict(interval) == "a null" else f"**{said}**"


def verdict(interval: dict[str, float | None]) -> str:
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return "not to be said"
    return "above chance" if low > 0.5 else "below chance" if high < 0.5 else "a null"


# ---- Kinds of tokens ----


class Run:
    """A row of the matched design: one model and contrast."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self._endpoints = {(one.get("planted"), one["of"]): one for one in row["endpoints"]}
        self.planted = list(dict.fromkeys(one["planted"] for one in row["endpoints"] if "planted" in one))

    def interval(self, planted: str | None, score: str, pairs: str = "matched") -> dict[str, float | None]:
        """Of a planted kind (None: visual against irrelevant), pairs of the same word ("matched") or all ("plain")."""
        found: dict[str, float | None] = self._endpoints[planted, score][pairs]
        return found

    def count(self, planted: str | None) -> str:
        first, second = self._endpoints[planted, "delta"]["tokens"]
        return f"{first:,} + {second:,}"

    def lines(self, pairs: str, scores: Sequence[str]) -> list[list[str]]:
        return [
            [planted, self.count(planted), *(cell(self.interval(planted, score, pairs)) for score in scores)]
            for planted in self.planted
        ]


def of_token_kinds(rows: Sequence[Row]) -> list[str]:
    runs = {(row["model"], row["contrast"]): Run(row) for row in rows if row.get("design") == DESIGN}
    first = [row for row in rows if "design" not in row]
    lines = ["## Kinds of tokens: does Δ know right from wrong?", ""]
    if (LAST, "drop") not in runs:
        return [*lines, "The matched design has no rows yet.", "", *first_design(first)]
    run = runs[LAST, "drop"]
    row, steps = run.row, run.row["steps"]
    lines += [
        DESIGNED,
        f"Model: `seecal demo --steps {sum(steps)}`, {steps[0]} steps of stage 1 and {steps[1]} of stage 2 with CAL. Run: "
        f"`python -m experiments.token_kinds seecal-demo`, {row['drawings']} drawings that the model has not seen, "
        f"{row['records']:,} texts, {row['seconds'] / 60:.0f} minutes a model and contrast on {_machine(row)}. What is "
        "planted and what the scores are: [token_kinds.yaml](../experiments/token_kinds.yaml).",
        "",
        f"### The same token of the same text, where it fits against where it does not ({LAST}, contrast drop)",
    ]
    head = ["planted", "tokens, right + wrong", *(NAMES[score] for score in SCORES)]
    lines += table(head, run.lines("matched", SCORES))
    lines += [READING]
    lines += ["### All pairs of tokens, whatever the word (the same run)"]
    lines += table(head, run.lines("plain", SCORES))
    lines += ["### Visual tokens against tokens of stock phrases (all pairs)"]
    lines += table(
        ["model", "contrast", "tokens", *(NAMES[score] for score in SCORES)],
        [
            [model, contrast, one.count(None), *(cell(one.interval(None, score, "plain")) for score in SCORES)]
            for (model, contrast), one in runs.items()
        ],
    )
    lines += ["### By model and contrast: the same token of the same text, by Δ and by gain"]
    lines += table(
        ["model", "contrast", "score", *run.planted],
        [
            [model, contrast, NAMES[score], *(cell(one.interval(planted, score)) for planted in one.planted)]
            for (model, contrast), one in runs.items()
            for score in ("delta", "gain")
        ],
    )
    if missing := [f"{contrast} {model}" for model, contrast in PLANS if (model, contrast) not in runs]:
        lines += [f"Planned and not run yet: {', '.join(missing)}.", ""]
    lines += ["### What was expected, and what came", "", *(f"- {line}" for line in expectations(runs)), ""]
    return [*lines, *first_design(first)]


def _machine(row: Row) -> str:
    threads = f"{row['threads']} CPU thread{'s' if row['threads'] > 1 else ''}"
    return f"{threads} in {'bfloat16' if row['bfloat16'] else 'float32'}, torch {row['torch']}"


def expectations(runs: dict[tuple[str, str], Run]) -> list[str]:
    """Each hypothesis of the matched design with what its rows say."""
    run = runs[LAST, "drop"]
    both = ("object", "kind")

    def value(planted: str, score: str, pairs: str = "matched") -> float:
        found = run.interval(planted, score, pairs)["estimate"]
        return 0.5 if found is None else found

    def said(keys: Sequence[tuple[str, str]], pairs: str = "matched") -> str:
        """The cells, one after the other, in words."""
        intervals = [(planted, score, run.interval(planted, score, pairs)) for planted, score in keys]
        return "; ".join(
            f"{planted} by {NAMES[score]} {cell(interval).strip('*')}, {verdict(interval)}"
            for planted, score, interval in intervals
        )

    def line(held: bool, expected: str, seen: str) -> str:
        return f"{'Held' if held else 'Did not hold'}: {expected}. {seen}.".replace("..", ".")

    sure = [(planted, score) for planted in both for score in ("delta", "gain")]
    found = [
        line(
            all(verdict(run.interval(*one)) == "above chance" for one in sure),
            "object and kind are above chance",
            said(sure),
        )
    ]
    control = [(planted, "logprob_without") for planted in run.planted] + [(FILLER, score) for score in LOGS[:3]]
    off = [one for one in control if verdict(run.interval(*one)) != "a null"]
    nulls = f"{len(control) - len(off)} of {len(control)} nulls{'; not so ' + said(off) if off else ''}"
    found.append(line(not off, "nulls where no image is seen, or where nothing can be right or wrong", nulls))
    for score in ("delta", "gain"):
        after, alone = (abs(value(name, score) - 0.5) for name in (AFTER_NAME, "kind"))
        expected = f"the kind after the name is nearer to chance than the kind alone, by {NAMES[score]}"
        found.append(line(after < alone, expected, said([(AFTER_NAME, score), ("kind", score)])))
    better = all(value(planted, "gain", "plain") > value(planted, "delta", "plain") for planted in both)
    keys = [(planted, score) for planted in both for score in ("delta", "gain", "logprob_with")]
    found.append(line(better, "over all pairs gain is above Δ", said(keys, "plain")))
    never = [(planted, score) for planted in ("colour", "count") for score in ("delta", "gain")]
    held = all(verdict(run.interval(*one)) == "a null" for one in never)
    found.append(line(held, "nulls for what the demo was never trained on", said(never)))
    keys = [("negation", score) for score in ("delta", "gain")]
    held = all(verdict(run.interval(*one)) != "above chance" for one in keys)
    found.append(line(held, 'negation at or below chance, because "not" is overlooked', said(keys)))
    blind = run.interval(None, "logprob_without", "plain")["estimate"] or 0.5
    return [*found, _visual(run.interval(None, "delta", "plain"), blind)]


def _visual(delta: dict[str, float | None], blind: float) -> str:
    """What Δ says of visual tokens, beside what a score says that never sees the image."""
    return (
        f"Nothing was expected of visual against irrelevant tokens here. By Δ {cell(delta).strip('*')}, {verdict(delta)}; "
        f"the log-probability without any image tells them apart by {max(blind, 1 - blind):.3f}"
        f"{', the lower the likelier visual' if blind < 0.5 else ''}: they are other words, which is enough."
    )


def first_design(rows: Sequence[Row]) -> list[str]:
    """The rows that were made before, and why they are not read."""
    chosen = {
        (row["planted"], row["of"]): row
        for row in rows
        if (row["model"], row["contrast"], row["weighting"]) == (LAST, "drop", "cal")
    }
    planted = [name for name, score in chosen if score == "delta" and name != "caption"]
    if not planted:
        return []
    columns = ("delta", "weight")
    return [
        "### The first design, not to be read",
        "",
        "Its wrong words are other words than its right ones, so these figures (all pairs, another training of the demo) "
        "may come from words alone. Only `object` has many of each. The rows stay in the file, without the key `design`.",
        *table(
            ["planted", "Δ", "weight cal"],
            [[name, *(cell(chosen[name, column]).strip("*") for column in columns)] for name in planted],
        ),
    ]


# ---- Swapped captions ----


def of_swapped_captions(rows: Sequence[Row]) -> list[str]:
    plan = yaml.safe_load((HERE / "swapped_captions.yaml").read_text("utf8"))
    models = [model for model in (LAST, FIRST) if any(row["model"] == model for row in rows)]
    lines = []
    for model in models:
        for rule in plan["rules"]:
            of_rule = {row["endpoint"]: row for row in rows if (row["model"], row["rule"]) == (model, rule)}
            share = of_rule.get("found in the tenth removed")
            interval = "–"
            if share:
                interval = f"{100 * share['estimate']:.0f} % ({100 * share['low']:.0f}–{100 * share['high']:.0f})"
            lines.append([model, rule, interval, cell(of_rule.get("auroc"))])
    one = rows[0]
    return [
        "## Swapped captions: does `seecal filter` find them?",
        "",
        f"10 % of {one['records']} descriptions of unseen drawings exchanged, {one['seeds']} plantings ({one['planted']} "
        "wrong captions), `python -m experiments.swapped_captions seecal-demo`. Chance finds 10 %.",
        *table(["model", "rule", "found in the tenth removed", "AUROC"], lines),
    ]


if __name__ == "__main__":
    from .pictures import draw

    known = pool()
    PAGE.write_text(page(Rows("token_kinds").all, Rows("swapped_captions").all, known), "utf8")
    README.write_text(readme(README.read_text("utf8"), known), "utf8")
    draw(known, PAGE.parent)
