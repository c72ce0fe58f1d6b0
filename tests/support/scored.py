"""A scored folder without a model: real files by the real writers, with numbers that a test chooses."""

import json
import re
from dataclasses import asdict

import numpy as np

from seecal.core.options import CALOptions
from seecal.scoring.manifest import Manifest
from seecal.scoring.records import Data
from seecal.scoring.shards import ShardNote, Skipped, columns, write
from tests.support.tiny import tiny_image

PIECES = re.compile(r"\s*\S+|\s+")
COLOURS = ("red", "green", "blue", "yellow")


def llava_file(folder, answers, *, image=True, questions=None, ids=None):
    """data.json in LLaVA's format, with one image for every four records; ``answers``: a text or a list of turns each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, answer in enumerate(answers):
        colour = COLOURS[number % len(COLOURS)]
        turns = [answer] if isinstance(answer, str) else answer
        asked = questions[number] if questions else "What is it?"
        chat = []
        for turn, text in enumerate(turns):
            mark = "<image>\n" if image and turn == 0 else ""
            chat += [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": text}]
        row = {"id": ids[number] if ids else f"r{number}", "conversations": chat}
        rows.append(row | ({"image": f"{colour}.png"} if image else {}))
    if image:
        for colour in COLOURS:
            tiny_image(colour).resize((320, 200)).save(folder / f"{colour}.png")
    path = folder / "data.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), "utf8")
    return path


def scored_folder(
    data,
    out,
    *,
    seed=0,
    shift=0.0,
    skipped=(),
    model="a/model",
    delta_of=None,
    per_shard=256,
    change=None,
    image_root=None,
    logprobs=False,
):
    """Scores of a file of records: tokens are its words, Δ drawn at random or ``delta_of(record number, tokens)``.
    ``change(record number, token, values)`` may change the values of a token. ``logprobs``: Δ is the gain too."""
    source = Data(data if hasattr(data, "features") else str(data), image_root=image_root)
    fingerprint, rows = source.fingerprint(on_bad="skip")
    told = {"name": model, "adapter": None, "weights": f"w{seed}", "processor": "p", "dtype": "float32"}
    where = {"name": source.name, "format": source.format, "image_root": list(source.roots)}
    manifest = Manifest(
        told,
        {**where, "fingerprint": fingerprint, "rows": rows},
        asdict(CALOptions()),
        list(columns(logprobs)),
        per_shard,
        {},
    )
    out.mkdir(parents=True)
    manifest.write(out)
    draw = np.random.default_rng(seed)
    located = list(source.rows())
    for shard in range(manifest.shards):
        found = {name: [] for name in columns(logprobs)}
        notes, records = [], 0
        for number in range(shard * per_shard, min((shard + 1) * per_shard, len(located))):
            row = located[number]
            if row.record is None or row.record["id"] in skipped:
                notes.append(Skipped(row.source, row.row, row.record and row.record["id"], f"row {row.row}: left out"))
                continue
            records += 1
            _add(found, row, draw, shift, delta_of, change, logprobs)
        write(out, shard, manifest, found, ShardNote(records, len(found["row"]), sum(found["has_contrast"]), notes))
    return out


def _add(found, row, draw, shift, delta_of, change, logprobs=False):
    answers = [message for message in row.record["messages"] if message["role"] == "assistant"]
    seen = bool(row.record["images"])
    position = 10
    for turn, message in enumerate(answers):
        text = "".join(part["text"] for part in message["content"])
        spans = [piece.span() for piece in PIECES.finditer(text)] + [(len(text), len(text))]
        deltas = delta_of(row.row, len(spans)) if delta_of else draw.normal(1 + shift, 2, len(spans))
        for (start, stop), delta in zip(spans, deltas, strict=True):
            position += 1
            values = {"source": row.source, "row": row.row, "record": row.record["id"], "turn": turn}
            values |= {
                "position": position,
                "token_id": sum(map(ord, text[start:stop])) % 1000,
                "token": text[start:stop] or "<|end|>",
            }
            delta = float(delta) if seen else 0.0
            values |= {"start": start, "stop": stop, "has_contrast": seen, "delta": delta, "logit_with": 9.0}
            values |= {"logit_without": 9.0 - delta, "weight": min(max(delta, 1.0), 5.0)}
            if logprobs:
                values |= {"logprob_with": -1.0, "logprob_without": -1.0 - delta}
            if change:
                change(row.row, position - 11, values)
            for name, value in values.items():
                found[name].append(value)
