"""Does Δ tell visual from irrelevant tokens, and wrong from right ones? token_kinds.yaml has what was expected.

    python -m experiments.token_kinds SEECAL-DEMO [--limit N]

SEECAL-DEMO is the folder that `seecal demo` leaves. Runs that have their row are not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import seecal
from seecal import WEIGHTINGS, CALOptions, VisualDelta
from seecal.demo.compute import bf16_pays, precision
from seecal.scoring import RecordScores, read_manifest, read_scores

from .planted import FILLER, PLANTED, VISUAL, Case, cases
from .rows import Rows, rounded
from .statistics import Observations, grouped_auroc, matched_auroc
from .swapped_captions import MODELS

DESIGN = "matched"
CONTRASTS = ("drop", "blur", "noise", "mask")
LAST, FIRST = "after stage 2", "after stage 1"
# What matters most comes first
PLANS = [(LAST, "drop"), (FIRST, "drop")] + [(model, contrast) for model in (LAST, FIRST) for contrast in CONTRASTS[1:]]
WEIGHTED = ("cal", "negative", "vig")
LOGS = ("delta", "gain", "logprob_with", "logprob_without")
SCORES = (*LOGS, *(f"weight of {name}" for name in WEIGHTED))


@dataclass
class Tokens:
    """The tokens of one label: of each its scores, where it stands in which text, and beside which drawing."""

    scores: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in SCORES})
    words: list[int] = field(default_factory=list)
    drawings: list[int] = field(default_factory=list)

    def add(self, scores: dict[str, float], word: int, drawing: int) -> None:
        for name, value in scores.items():
            self.scores[name].append(value)
        self.words.append(word)
        self.drawings.append(drawing)

    def of(self, score: str) -> Observations:
        return Observations(np.array(self.scores[score]), np.array(self.words, int), np.array(self.drawings, int))


Found = dict[tuple[str, bool], Tokens]  # (label, does the text fit) -> its tokens


def labelled(case: Case, record: RecordScores) -> Iterator[tuple[int, str, int]]:
    """(token, label, its start) of each that starts in a labelled piece, blanks before it aside."""
    ends = np.cumsum([len(text) for text, _ in case.pieces])
    starts, stops = record.columns["start"], record.columns["stop"]
    for token, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if start == stop:
            continue
        inside = case.text[start:stop]
        first = start + len(inside) - len(inside.lstrip())
        label = case.pieces[int(np.searchsorted(ends, min(first, stop - 1), side="right"))][1]
        if label:
            yield token, label, int(start)


def scores_of(record: RecordScores) -> dict[str, np.ndarray]:
    """Every score of a record's tokens; the weights are those that the weightings give to what was measured."""
    columns = {name: np.asarray(values) for name, values in record.columns.items()}
    measured = {name: torch.from_numpy(columns[name].copy()) for name in ("delta", "position", "has_contrast")}
    measured |= {name: torch.from_numpy(columns[name].copy()) for name in ("logprob_with", "logprob_without")}
    labels = torch.from_numpy(columns["token_id"].copy())
    delta = VisualDelta(labels=labels, sample=torch.zeros(len(labels), dtype=torch.int64), **measured)
    found = {name: columns[name].astype(np.float64) for name in ("delta", "logprob_with", "logprob_without")}
    found["gain"] = found["logprob_with"] - found["logprob_without"]
    for name in WEIGHTED:
        found[f"weight of {name}"] = WEIGHTINGS[name](delta, CALOptions(weighting=name)).double().numpy()
    return found


def measured(model: Path, known: list[Case], contrast: str, bf16: bool) -> tuple[Found, str]:
    """(the tokens of each label, digest of the model)."""
    found: Found = {}
    words: dict[tuple[str, str, int], int] = {}
    with tempfile.TemporaryDirectory() as place:
        data, scores = Path(place) / "data.json", Path(place) / "scores"
        data.write_text(json.dumps([_record(number, case) for number, case in enumerate(known)]), "utf8")
        options = CALOptions(contrast=contrast)
        with precision(torch.device("cpu"), bf16):
            seecal.score(str(model), str(data), scores, options=options, logprobs=True, image_root="/", batch_size=16)
        for case, record in zip(known, read_scores(scores), strict=True):
            assert isinstance(record, RecordScores)
            values = scores_of(record)
            for token, label, start in labelled(case, record):
                word = words.setdefault((label, case.text, start), len(words))
                tokens = found.setdefault((label, case.fits), Tokens())
                tokens.add({name: float(value[token]) for name, value in values.items()}, word, case.drawing)
        return found, str(read_manifest(scores).model["weights"])


def _record(number: int, case: Case) -> dict[str, Any]:
    asked = {"from": "human", "value": f"<image>\n{case.question}"}
    said = {"from": "gpt", "value": case.text}
    return {"id": str(number), "image": str(case.image), "conversations": [asked, said]}


def endpoints(found: Found) -> list[dict[str, Any]]:
    """AUROCs: of each planted kind inside words and over all pairs, and of visual against irrelevant tokens."""
    rows = []
    for planted in PLANTED:
        one, other = found.get((planted, True)), found.get((planted, False))
        if one is None or other is None:
            continue
        for score in SCORES:
            high, low = one.of(score), other.of(score)
            told = {"endpoint": "right against wrong", "planted": planted, "of": score}
            told |= {"tokens": [len(high.values), len(low.values)], "words": len(np.intersect1d(high.words, low.words))}
            plain = grouped_auroc(high.values, high.groups, low.values, low.groups)
            rows.append({**told, "matched": rounded(matched_auroc(high, low)), "plain": rounded(plain)})
    seen, filler = [found[label, True] for label in VISUAL if (label, True) in found], found[FILLER, True]
    for score in SCORES:
        parts, low = [one.of(score) for one in seen], filler.of(score)
        values, groups = (np.concatenate([getattr(one, name) for one in parts]) for name in ("values", "groups"))
        told = {"endpoint": "visual against irrelevant", "of": score, "tokens": [len(values), len(low.values)]}
        rows.append({**told, "plain": rounded(grouped_auroc(values, groups, low.values, low.groups))})
    return rows


def run(demo: Path, limit: int | None, rows: Rows) -> None:
    """All that is missing of the experiment."""
    bf16, _ = bf16_pays()
    recipe = yaml.safe_load((demo / "recipe.yaml").read_text("utf8"))
    steps = [stage["max_steps"] for stage in recipe["stages"]]
    with tempfile.TemporaryDirectory() as folder:
        known = cases(demo, Path(folder), limit)
        told = {"experiment": "token_kinds", "design": DESIGN, "drawings": len({case.drawing for case in known})}
        for name, contrast in PLANS:
            keys = {**told, "model": name, "contrast": contrast}
            if rows.has(**keys):
                continue
            begun = time.monotonic()
            found, digest = measured(demo / MODELS[name], known, contrast, bf16)
            row = {**keys, "weights": digest, "steps": steps, "records": len(known), "bfloat16": bf16}
            row |= {"seecal": seecal.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
            row |= {"seconds": round(time.monotonic() - begun), "endpoints": endpoints(found)}
            rows.add(row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--limit", type=int, default=None, help="drawings of each split")
    options = parser.parse_args()
    run(options.demo.resolve(), options.limit, Rows("token_kinds"))
