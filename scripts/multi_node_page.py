"""Write the tables of docs/multi-node.md from the models' shapes and the formulas that the page states:

    python -m scripts.multi_node_page

Run it from the root of the repository. Nothing in it is measured.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from flops import step, work_of  # noqa: E402
from shapes import SHAPES, Shape, build, draw  # noqa: E402

PAGE = ROOT / "docs" / "multi-node.md"
_7B = SHAPES["llava-1.5-7b"]
MODELS = {
    "LLaVA-1.5 7B": _7B,
    "LLaVA-1.5 13B": dataclasses.replace(_7B, layers=40, hidden=5120, inter=13824, heads=40),
}
GPUS = (8, 16, 32)
GB = 1e9
MFU = 0.4
PEAKS = {"A100": 312e12, "H100": 989e12}  # dense bfloat16, FLOP/s, as NVIDIA's data sheets say
LINK = 50e9  # bytes/s of a GPU's share of the network: one port of 400 Gbit/s for each
LIVE, BUCKET = 1e9, 5e8  # DeepSpeed's defaults: stage3_max_live_parameters, reduce and all-gather buckets, in elements
Table = list[list[str]]


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        all: of everything.
        frozen: of the vision tower.
        layer: of one layer of the decoder.
        outside: of all that is in no layer of the decoder.
        projector: of the projector.
    """

    all: int
    frozen: int
    layer: int
    outside: int
    projector: int

    @property
    def trained(self) -> int:
        return self.all - self.frozen


def counts(shape: Shape) -> Counts:
    """Counted on a model without storage, made from the shape alone."""
    model = build(shape, torch.device("meta"), torch.bfloat16)

    def of(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    layers = model.model.language_model.layers
    whole, layer = of(model), of(layers[0])
    return Counts(
        whole, of(model.model.vision_tower), layer, whole - layer * len(layers), of(model.model.multi_modal_projector)
    )


def ddp(found: Counts, width: int = 4) -> float:
    """Bytes. ``width``: bytes of a number in the weights, and so in gradients and in each of AdamW's two moments."""
    cast = 2 if width == 4 else 0
    return found.trained * (width + width + width + 2 * width + cast) + found.frozen * width


def ddp_projector(found: Counts) -> float:
    """The first stage: the projector trains, everything else is frozen in float32."""
    return found.projector * (4 + 4 + 4 + 8 + 2) + (found.all - found.projector) * 4


def fsdp2(found: Counts, gpus: int) -> float:
    shared = found.trained * (4 + 4 + 8) + found.frozen * 4
    gathered = 2 * (found.outside + 2 * found.layer) + 2 * (found.outside + found.layer)
    return shared / gpus + gathered


def zero2(found: Counts, gpus: int) -> float:
    return 2 * found.all + found.trained * (2 + 4 + 4 + 8) / gpus + 2 * 2 * BUCKET


def zero3(found: Counts, gpus: int) -> float:
    return (2 * found.all + found.trained * (2 + 4 + 4 + 8)) / gpus + 2 * LIVE + 2 * 2 * BUCKET


def activations(shape: Shape, tokens: int) -> float:
    """Bytes in bfloat16 with every layer checkpointed: the input of each, and one layer's own, forward and backward."""
    one_layer = 9 * shape.hidden + 4 * shape.inter
    logits = 2 * 4 * (1 << 25)  # a chunk of logits in float32, and what its softmax holds
    return tokens * 2 * (shape.layers * shape.hidden + 2 * one_layer) + logits


def gigabytes(value: float) -> str:
    return f"{value / GB:.0f}"


def count_table() -> Table:
    rows = [["parameters, in millions", "all", "vision tower", "projector", "one decoder layer", "outside the layers"]]
    for name, shape in MODELS.items():
        found = counts(shape)
        numbers = (found.all, found.frozen, found.projector, found.layer, found.outside)
        rows.append([name, *(f"{number / 1e6:,.0f}" for number in numbers)])
    return rows


def memory_table() -> Table:
    rows = [["GB on each GPU", *(f"{name}, {gpus} GPUs" for name in MODELS for gpus in GPUS)]]
    found = [(counts(shape), gpus) for shape in MODELS.values() for gpus in GPUS]
    engines = {
        "DDP": lambda one, gpus: ddp(one),
        "DDP, `dtype: bfloat16`": lambda one, gpus: ddp(one, 2),
        "DDP, the projector alone": lambda one, gpus: ddp_projector(one),
        "FSDP2": lambda one, gpus: fsdp2(one, gpus),
        "ZeRO-2": zero2,
        "ZeRO-3": zero3,
    }
    for name, function in engines.items():
        rows.append([name, *(gigabytes(function(one, gpus)) for one, gpus in found)])
    held = [activations(shape, sum(work_of(draw(shape)[0]).rows)) for shape in MODELS.values() for _ in GPUS]
    return [*rows, ["activations, on top", *map(gigabytes, held)]]


def speed_table() -> Table:
    rows = [["a step on one GPU", *MODELS]]
    columns = []
    for shape in MODELS.values():
        work, found = work_of(draw(shape)[0]), counts(shape)
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
