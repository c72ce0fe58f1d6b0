"""Write the tables of docs/multi-node.md from the models' sizes and the formulas of `seecal plan`, which the page states:

    python -m scripts.multi_node_page

Run it from the root of the repository. Nothing in it is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from seecal.models.known import known_config
from seecal.ops.linear_cross_entropy import CHUNK_LOGITS
from seecal.planning.cost import decoder_cost
from seecal.planning.memory import GB, Counts, Precision, held
from seecal.planning.storageless import storageless_model

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from flops import step, work_of  # noqa: E402
from shapes import SHAPES, draw  # noqa: E402

PAGE = ROOT / "docs" / "multi-node.md"
_7B = SHAPES["llava-1.5-7b"]
MODELS = {
    "LLaVA-1.5 7B": _7B,
    "LLaVA-1.5 13B": dataclasses.replace(_7B, layers=40, hidden=5120, inter=13824, heads=40),
}
KNOWN = {"LLaVA-1.5 7B": "llava-1.5-7b", "LLaVA-1.5 13B": "llava-1.5-13b"}
GPUS = (8, 16, 32)
MFU = 0.4
PEAKS = {"A100": 312e12, "H100": 989e12}  # dense bfloat16, FLOP/s, as NVIDIA's data sheets say
LINK = 50e9  # bytes/s of a GPU's share of the network: one port of 400 Gbit/s for each
Table = list[list[str]]


@functools.cache
def model_of(name: str) -> Any:
    """Without storage, all but the tower training, in bfloat16."""
    model = storageless_model(known_config(KNOWN[name]), torch.bfloat16)
    model.model.vision_tower.requires_grad_(False)
    return model


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def counts(name: str, projector_only: bool = False) -> Counts:
    """Counted on a model without storage."""
    inner = model_of(name).model
    whole, layer = size(model_of(name)), size(inner.language_model.layers[0])
    trained = size(inner.multi_modal_projector) if projector_only else whole - size(inner.vision_tower)
    return Counts(whole, trained, layer, whole - layer * len(inner.language_model.layers))


@functools.cache
def activations(name: str, tokens: int) -> float:
    """Bytes in bfloat16 with every layer checkpointed: what is kept, what one layer works with, and a chunk of logits."""
    cost = decoder_cost(model_of(name)).checkpointed
    logits = CHUNK_LOGITS * (4 + 2)  # in float32, and their gradient
    return tokens * (cost.kept + cost.working) + logits


def gigabytes(value: float) -> str:
    return f"{value / GB:.0f}"


def count_table() -> Table:
    rows = [["parameters, in millions", "all", "vision tower", "projector", "one decoder layer", "outside the layers"]]
    for name in MODELS:
        found, inner = counts(name), model_of(name).model
        numbers = (found.all, size(inner.vision_tower), size(inner.multi_modal_projector), found.layer, found.outside)
        rows.append([name, *(f"{number / 1e6:,.0f}" for number in numbers)])
    return rows


def memory_table() -> Table:
    rows = [["GB on each GPU", *(f"{name}, {gpus} GPUs" for name in MODELS for gpus in GPUS)]]
    columns = [(name, gpus) for name in MODELS for gpus in GPUS]
    lines = {
        "DDP": ("ddp", 4, False),
        "DDP, `dtype: bfloat16`": ("ddp", 2, False),
        "DDP, the projector alone": ("ddp", 4, True),
        "FSDP2": ("fsdp2", 4, False),
        "ZeRO-2": ("zero2", 4, False),
        "ZeRO-3": ("zero3", 4, False),
    }
    for line, (engine, width, projector_only) in lines.items():
        found = [held(engine, counts(name, projector_only), gpus, Precision(width)) for name, gpus in columns]
        rows.append([line, *(gigabytes(one.total) for one in found)])
    on_top = [activations(name, sum(work_of(draw(MODELS[name])[0]).rows)) for name, _ in columns]
    return [*rows, ["activations, on top", *map(gigabytes, on_top)]]


def speed_table() -> Table:
    rows = [["a step on one GPU", *MODELS]]
    columns = []
    for name, shape in MODELS.items():
        work, found = work_of(draw(shape)[0]), counts(name)
        tokens = sum(work.rows)
        plain = step(shape, work.rows, work.labels)
        cal = step(shape, work.rows, work.labels, work.after, before=work.before)
        sent = 2 * found.all * 4
        column = [f"{tokens:,}", f"{plain / 1e12:.0f}", f"{cal / 1e12:.0f}"]
        for peak in PEAKS.values():
            column += [f"{cal / (MFU * peak):.1f}", f"{tokens * MFU * peak / cal:,.0f}"]
        columns.append([*column, f"{sent / GB:.0f}", f"{sent / LINK:.1f}"])
    labels = ["tokens of 8 samples", "TFLOP without CAL", "TFLOP with CAL"]
    for name in PEAKS:
        labels += [f"{name}: seconds at {MFU:.0%}", f"{name}: tokens/s at {MFU:.0%}"]
    labels += ["GB through the network under FSDP2", f"seconds for that at {LINK / GB:.0f} GB/s a GPU"]
    return rows + [[label, *cells] for label, *cells in zip(labels, *columns, strict=True)]


TABLES = {"parameters": count_table, "memory": memory_table, "speed": speed_table}


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: python -m scripts.multi_node_page -->\n", f"<!-- end of {name} -->"


def with_table(text: str, name: str, rows: Table) -> str:
    """The page's text with this table in the place of the one before."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    begin, end = _marks(name)
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end, 1)[1]


def main() -> None:
    text = PAGE.read_text("utf8")
    for name, table in TABLES.items():
        text = with_table(text, name, table())
    PAGE.write_text(text, "utf8")


if __name__ == "__main__":
    main()
