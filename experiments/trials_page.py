"""The part of docs/evidence.md that is about training: alignment of every cell, then each experiment."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seecal.evaluation.over_seeds import Paired, pooled

from .designs import DEMO, Design, design, names
from .findings import MEASURES, Alignment, Comparison, Findings, alignments, cell_name
from .items import unpacked

Row = dict[str, Any]
ORDER = (
    "types_and_tasks", "more_cells", "scenes", "scenes_rates", "controls", "noise", "stages", "clamp", "contrasts",
    "window", "relatives", "delta_over_training", "stored_weights", "beyond", "real_weights",
)  # fmt: skip
TITLES = {
    "types_and_tasks": "Types of model and tasks",
    "more_cells": "The other cells of the grid, sizes and resolutions",
    "scenes": "Scenes with swapped answers, on fresh seeds",
    "scenes_rates": "Scenes again, every arm at its own learning rate",
    "controls": "Controls in another type of model",
    "noise": "Swapped answers",
    "stages": "In which stage",
    "clamp": "Alpha and beta",
    "contrasts": "How the image is taken away",
    "window": "Pooling",
    "relatives": "Relatives of CAL",
    "delta_over_training": "Δ over a training, and a cold start",
    "stored_weights": "Weights that were measured before",
    "beyond": "Beyond the paper",
    "real_weights": "Real weights",
}
INTRODUCTION = """\
## Training: CAL against plain training

`seecal bench evidence NAME` makes the runs of an experiment that have no row yet, in pieces of 30 minutes on two cores, and
`seecal bench evidence --plan` says what all of it takes and what was left out, by name. A run is one training by
`CALTrainer`; both arms of a pair start from the same alignment (where stage 1 is what differs, from the same tower and
language model) and see the same records in the same order. All ten runs of `window`, made again from a clean clone and an
empty cache on the same kind of processor, had the committed numbers to the last digit; another kind rounds otherwise.

Differences are paired: the same seed, the same items of the test set (of validation where the section says so). In
brackets: 95 % intervals, from the lower to the upper end of two, Student's t over the seeds and a bootstrap over seeds and
items (percentiles widened for few seeds); p is the larger one of that t's and of the t with the bootstrap's spread. Bold:
both intervals are clear of zero, and so is p of the exact match after Holm's correction: over an experiment's pooled
comparisons, and for themselves over those of single cells. NLLs are not corrected. Pooled: the mean over the cells that
count; nothing is said of other cells.

The second table of an experiment is always of the test set. Its column on Δ is over the tokens after an image, before
pooling: how many have Δ at or below α, between, at or above β ("–" for weightings that do not clamp Δ so). Minutes are
those of weighing and training, without the measuring.
"""
ALIGNMENT = """\
### Do the models see? The alignment of every cell

A cell counts if a plain stage 2 on clean answers brings the test accuracy at least halfway from the commonest answer's
share to 1, and the mean Δ of visual tokens after stage 1 is at least 1 logit and above that of filler. Others are shown and
not pooled. α and β are calibrated: α is the Δ that as many tokens exceed as are words of the image (a twentieth to a
fifth), and two fifths of those reach β. Inside: the share of tokens whose Δ lies between the paper's 1 and 5, where a
weight is not the same for all.
"""
_CLASSES = ("visual", "filler")  # of tokens, as rows have them
_BETTER = {"above": "more right than", "below": "fewer right than"}


def of_trials(rows: Mapping[str, Row]) -> list[str]:
    """The lines.

    Args:
        rows: of all experiments, by key (:func:`experiments.runner.pool`).
    """
    known = alignments(rows.values())
    found = [Findings(design(name), rows, known) for name in in_order()]
    lines = [INTRODUCTION, *in_short(found), *of_alignment(known, [one.design for one in found])]
    for one in found:
        lines += of_experiment(one)
    return lines


def in_short(found: Sequence[Findings]) -> list[str]:
    """A line for each experiment, with the sentence of its section on the exact match."""
    lines, clear = [], 0
    for one in found:
        title, compared = title_of(one.design), one.compared()
        clear += one.whole and any(judged.verdict in _BETTER for judged in _judged(one, compared))
        so_far = "" if one.whole else "so far: "
        lines.append(f"- [{title}](#{anchor(title)}): {so_far}{of_exact(one, compared)}")
    count = f"{clear} of {len(found)} experiments {'has' if clear == 1 else 'have'}"
    return ["### In short", "", f"{count} a difference in exact match that is clear of zero.", "", *lines, ""]


def title_of(plan: Design) -> str:
    return TITLES.get(plan.name, plan.name)


def anchor(title: str) -> str:
    """Where GitHub puts a heading: no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def in_order() -> list[str]:
    """The experiments that train, as the page has them."""
    there = names()
    return [name for name in ORDER if name in there] + [name for name in there if name not in ORDER]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return ["", *("| " + " | ".join(row) + " |" for row in rows), ""]


def of_alignment(known: Mapping[str, Alignment], plans: Sequence[Design]) -> list[str]:
    """The table of cells, and which of the designs' cells have no rows."""
    lines = [ALIGNMENT]
    if known:
        head = ["cell", "seeds", "commonest answer", "after stage 1", "after clean stage 2", "Δ visual", "Δ filler"]
        lines += table([*head, "α", "β", "inside [1, 5]", "counts"], [_alignment_line(one) for one in known.values()])
    cells = {json.dumps(cell, sort_keys=True): cell for plan in plans for cell in plan.cells if cell != {"model": DEMO}}
    if waiting := [cell_name(cell) for key, cell in cells.items() if key not in known]:
        lines += [f"No rows yet: {', '.join(waiting)}.", ""]
    return lines


def _alignment_line(one: Alignment) -> list[str]:
    shares = (f"{100 * share:.0f} %" for share in (one.commonest, one.accuracy, one.tuned))
    logits = (f"{value:.2f}" for value in (one.visual, one.filler, one.alpha, one.beta))
    last = (f"{100 * one.inside:.0f} %", "yes" if one.counts else "**no**")
    return [cell_name(one.cell), str(one.seeds), *shares, *logits, *last]


# ---- One experiment ----


def of_experiment(found: Findings) -> list[str]:
    """Its section."""
    plan = found.design
    told = [f"### {title_of(plan)}", "", _sentence(plan.told["question"]), ""]
    told += [f"Expected ([{plan.name}.yaml](../experiments/{plan.name}.yaml)): {_flat(plan.told['hypothesis'])}", ""]
    command = f"`seecal bench evidence {plan.name}`"
    if not found.found:
        return [*told, f"No rows yet: {len(plan.runs)} runs are planned. {command}", *_left_out(plan)]
    compared = found.compared()
    so_far = "" if found.whole else "So far: "
    told += [f"{command}, {ran(found)}", "", f"**{so_far}{said(found, compared)}**", ""]
    if compared:
        told += [f"![Differences in exact match](evidence-{plan.name}.svg)", *differences(found, compared)]
    return [*told, *means(found), *by_rate(found), *traces(found), *_left_out(plan)]


def _flat(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _left_out(plan: Design) -> list[str]:
    if not plan.cut:
        return [""]
    told = "; ".join(f"{one['what']} ({one['why']})" for one in plan.cut)
    return ["", f"Left out: {told}.", ""]


_TWO_KINDS = " A pair with a row of each kind starts from alignments that are the same but for rounding."


def ran(found: Findings) -> str:
    """How many runs, on what, and how long."""
    rows = [row for _, row in found.found]
    devices = sorted({f"{row['threads']} thread{'s' * (row['threads'] > 1)} of {row['device']}" for row in rows})
    seconds = [sum(row["seconds"].get(name, 0) for name in ("weighing", "training", "measuring")) for row in rows]
    waiting = len(found.design.runs) - len(rows)
    return (
        f"{len(rows)} runs of {np.median(seconds) / 60:.1f} minutes (the median) on {', '.join(devices)}, torch "
        f"{', '.join(sorted({row['torch'] for row in rows}))}.{_TWO_KINDS if len(devices) > 1 else ''}"
        f"{f' Missing: {waiting} of {len(found.design.runs)} runs, so read nothing into it yet.' if waiting else ''}"
    )


def said(found: Findings, compared: Sequence[Comparison]) -> str:
    """What it says of the exact match and, in another sentence, of the NLL, chosen from the intervals."""
    judged = _judged(found, compared)
    known = any(one.verdict != "unknown" for one in judged)
    return of_exact(found, compared) + (_of_nll(judged) if known else "")


def _judged(found: Findings, compared: Sequence[Comparison]) -> list[Comparison]:
    return [one for one in compared if one.is_pooled] or [one for one in compared if found.counts(one.cells[0])]


def of_exact(found: Findings, compared: Sequence[Comparison]) -> str:
    """One sentence on the exact match."""
    judged = _judged(found, compared)
    if not judged:
        return (
            "Nothing: no cell counts, because none of the models is aligned well enough, or no pair of runs is there."
        )
    known = [one for one in judged if one.verdict != "unknown"]
    if not known:
        return "Nothing yet: an interval needs two seeds."
    where = " on validation" if found.split == "validation" else ""
    clear = [one for one in judged if one.verdict in _BETTER]
    others = len(judged) - len(clear)
    parts = [
        f"{_of(one)}: {shown(one.primary, points=True)} points, {_BETTER[one.verdict]} {one.baseline}" for one in clear
    ]
    if not parts:
        ends = sorted((max(abs(one.primary.low), abs(one.primary.high)), _of(one, ", {}")) for one in known)
        told = f"none of its {others} comparisons can" if others > 1 else "its one comparison cannot"
        out = " to ".join(f"{end:.1f} points ({of})" for end, of in dict.fromkeys((ends[0], ends[-1])))
        corrected = " after Holm's correction" if others > 1 else ""
        return (
            f"A null in exact match{where}: {told} be told from zero{corrected}; differences above {out} are outside of "
            "the intervals."
        )
    rest = f"; {others} other comparison{'s are nulls' if others > 1 else ' is a null'}" if others else ""
    return f"In exact match{where}, {'; '.join(parts)}{rest}."


def _of_nll(judged: Sequence[Comparison]) -> str:
    """In how many comparisons the NLL of visual tokens is clear of zero, uncorrected."""
    told = []
    for measure, lead in (("nll_visual", "NLL of visual tokens is"), ("nll_fitted", "with a fitted temperature it is")):
        verdicts = [one.measures[measure].verdict() for one in judged if measure in one.measures]
        if verdicts:
            lower, higher, all_ = verdicts.count("below"), verdicts.count("above"), len(verdicts)
            told.append(f"{lead} lower in {lower} and higher in {higher} of {all_}")
    return f" {', '.join(told)}." if told else ""


def _of(one: Comparison, noise: str = " ({})") -> str:
    return one.arm + noise.format(f"{100 * one.noise:.0f} % swapped")


def shown(one: Paired | None, points: bool = False) -> str:
    """A difference with its interval."""
    if one is None:
        return "–"
    form = "{:+.1f}" if points else "{:+.3f}"
    if one.verdict() == "unknown":
        return f"{form.format(one.estimate)} (one seed)".replace("-", "−")
    return f"{form.format(one.estimate)} ({form.format(one.low)} to {form.format(one.high)})".replace("-", "−")


def differences(found: Findings, compared: Sequence[Comparison]) -> list[str]:
    """The table of paired differences, pooled ones first."""
    known = [name for name in MEASURES if any(name in one.measures for one in compared)]
    head = ["arm − baseline", "cell", "swapped", "seeds", *(MEASURES[name] for name in known), "p, Holm"]
    lines = []
    for one in compared:
        where = f"pooled over {len(one.cells)}" if one.is_pooled else cell_name(json.loads(one.cells[0]))
        if not one.is_pooled and not found.counts(one.cells[0]):
            where += " (does not count)"
        cells = [_bold(one, name) for name in known]
        p = "–" if np.isnan(one.corrected) else f"{one.corrected:.3f}"
        seeds = str(one.primary.seeds)
        lines.append([f"{one.arm} − {one.baseline}", where, f"{100 * one.noise:.0f} %", seeds, *cells, p])
    return table(head, lines)


def _bold(one: Comparison, measure: str) -> str:
    found = one.measures.get(measure)
    text = shown(found, points=measure == "exact")
    verdict = one.verdict if measure == "exact" else found.verdict() if found else "unknown"
    return f"**{text}**" if verdict in _BETTER else text


def means(found: Findings) -> list[str]:
    """The table of what each arm reaches, and where its weights lie."""
    lines = []
    for cell in found.design.cells:
        key = json.dumps(cell, sort_keys=True)
        for noise in sorted({run.noise for run in found.design.runs}):
            for arm in found.design.arms:
                if rows := list(found.chosen(key, noise, arm).values()):
                    lines.append([cell_name(cell), f"{100 * noise:.0f} %", arm, *_means(found, rows)])
    known = [MEASURES[name].removesuffix(", points") for name in MEASURES]
    head = ["cell", "swapped", "arm", "runs", "learning rate", *known, "Δ ≤ α / between / ≥ β", "minutes (median)"]
    return table(head, lines)


def _means(found: Findings, rows: Sequence[Row]) -> list[str]:
    values = []
    for measure in MEASURES:
        arrays = [unpacked(row["test"][measure]) for row in rows if measure in row["test"]]
        mean = float(np.mean([np.nanmean(one) for one in arrays])) if arrays else None
        values.append("–" if mean is None else f"{100 * mean:.1f} %" if measure == "exact" else f"{mean:.3f}")
    there = [row["shares"] for row in rows if row["shares"] and row["options"].get("weighting", "cal") == "cal"]
    places = ("at_alpha", "inside", "at_beta")
    lie = " / ".join(f"{100 * np.mean([one[name] for one in there]):.0f}" for name in places) if there else ""
    minutes = np.median([row["seconds"]["training"] + row["seconds"].get("weighing", 0) for row in rows]) / 60
    return [str(len(rows)), f"{rows[0]['learning_rate']:g}", *values, f"{lie} %" if lie else "–", f"{minutes:.1f}"]


def by_rate(found: Findings) -> list[str]:
    """The table of every learning rate, where an arm has several: what each arm reaches, and the pairs at one rate."""
    rates = sorted({run.learning_rate for run in found.design.runs})
    lines = []
    for cell, noise in itertools.product(found.design.cells, sorted({run.noise for run in found.design.runs})):
        key, where = json.dumps(cell, sort_keys=True), [cell_name(cell), f"{100 * noise:.0f} %"]
        tried = {arm: found.runs(key, noise, arm) for arm in found.design.arms}
        several = [arm for arm, runs in tried.items() if len(runs) > 1]
        lines += [[*where, arm, *_at_rates(tried[arm], rates, found.rate(key, noise, arm))] for arm in several]
        for arm, baseline in found.design.compare:
            if arm in several and baseline in several:
                pairs = [found.differences(arm, baseline, key, noise, "test", at=rate).get("exact") for rate in rates]
                told = [shown(pooled([one]), points=True) if one else "–" for one in pairs]
                lines.append([*where, f"{arm} − {baseline}, points", *told])
    if not lines:
        return []
    head = ["cell", "swapped", "arm", *(f"{rate:g}" for rate in rates)]
    return [
        "By learning rate: exact match on validation, then on the test set; bold: the rate that validation chose. Under "
        "them the differences on the test set where both arms have that rate.",
        *table(head, lines),
    ]


def _at_rates(runs: Mapping[float, Mapping[int, Row]], rates: Sequence[float], chosen: float | None) -> list[str]:
    told = []
    for rate in rates:
        means = [
            np.mean([unpacked(row[split]["exact"]).mean() for row in runs[rate].values()])
            for split in ("validation", "test")
            if rate in runs
        ]
        text = ", ".join(f"{100 * mean:.1f} %" for mean in means) or "–"
        told.append(f"**{text}**" if rate == chosen else text)
    return told


def traces(found: Findings) -> list[str]:
    """The table of Δ over training, where it was measured."""
    lines = []
    for arm in found.design.arms:
        rows = [row for run, row in found.found if run.name == arm and "trace" in row]
        for place in range(min((len(row["trace"]) for row in rows), default=0)):
            points = [row["trace"][place] for row in rows]
            lines.append([arm, str(points[0]["step"]), str(len(rows)), *(_spread(points, kind) for kind in _CLASSES)])
    if not lines:
        return []
    head = ["arm", "step", "runs", "visual tokens", "filler"]
    return ["Δ on validation in logits: the mean, in brackets the quartiles; means over the runs.", *table(head, lines)]


def _spread(points: Sequence[Mapping[str, Any]], kind: str) -> str:
    low, _, high = np.mean([one[f"{kind}_quartiles"] for one in points], axis=0)
    return f"{np.mean([one[kind] for one in points]):.2f} ({low:.2f} to {high:.2f})".replace("-", "−")


# ---- README ----


_QUOTED = (
    "Does it help? CAL with calibrated α and β minus plain training of small models, with none or a fifth of the "
    "training answers swapped ([docs/evidence.md](docs/evidence.md))."
)
_POOLED = ("types_and_tasks", "more_cells")


def quoted(rows: Mapping[str, Row]) -> list[str]:
    """The pooled tables, a line for each share of swapped answers; of an experiment nothing before every run is there."""
    known = alignments(rows.values())
    sentences, lines = [_QUOTED], []
    for name in _POOLED:
        found = Findings(design(name), rows, known)
        compared = found.compared() if found.whole else []
        together = [one for one in compared if one.is_pooled and (one.arm, one.baseline) == ("calibrated", "uniform")]
        lines += [
            [f"`{name}`", f"{one.primary.seeds // len(one.cells)} × {len(one.cells)}", f"{100 * one.noise:.0f} %",
             _bold(one, "exact"), _bold(one, "nll_visual")]
            for one in together
        ]  # fmt: skip
        if together:
            sentences.append(f"`{name}`: {of_exact(found, compared)}")
    head = ["experiment", "seeds × cells", "swapped answers", "exact match, points", "NLL of visual tokens"]
    return [" ".join(sentences), *table(head, lines)[:-1]] if lines else []
