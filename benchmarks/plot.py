"""Pictures of the CSVs: time and memory of a step per shape, memory of the loss, scaling. The dev extra has matplotlib.

Where a CSV is missing, or comes from a CPU whose times are noise, the picture shows the floors and says that the rest
waits. Exit code 0 all the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import scaling
from common import RESULTS
from flops import floors
from shapes import CPU_SHAPES, GPU_SHAPES, SHAPES
from targets import LABELS, WAITS, on_gpu, peak_gib, read

try:
    import matplotlib
except ImportError:
    raise SystemExit("seecal bench plot needs matplotlib: pip install -e '.[dev]'") from None
matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLACK, GREY, QUIET = "#000000", "#999999", "#555555"
COLOURS = {
    "hf": GREY,
    "trl": "#E69F00",
    "liger": "#F0E442",
    "released": "#D55E00",
    "mle": "#56B4E9",
    "cal-padded": "#CC79A7",
    "cal": "#0072B2",
}
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "seecal"})
Rows = list[dict[str, str]]


def step_picture(folder: Path) -> tuple[Any, list[str]]:
    """(figure, what waits). Bars: time as a share of hf's, the floor as a black mark; peak memory, weights included."""
    found = {name: read(folder / f"step-{name}.csv") for name in SHAPES if name not in CPU_SHAPES}
    tiny = not any(found[name] for name in GPU_SHAPES) and any(found.values())
    shapes = [name for name in found if (bool(found[name]) if tiny else name in GPU_SHAPES)]
    measured = {row["variant"] for rows in found.values() for row in rows if row["peak_mib"]}
    variants = [name for name in COLOURS if name != "liger" or name in measured]
    width, waits = 0.8 / len(variants), []
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7.5), layout="constrained", sharex=True)
    for place, shape in enumerate(shapes):
        places = {name: place + (i - (len(variants) - 1) / 2) * width for i, name in enumerate(variants)}
        timed, rows = on_gpu(found[shape]), _peaks(found[shape])
        _times(above, places, width, {row["variant"]: row for row in timed}, floors(SHAPES[shape]))
        for name, x in places.items():
            if name in rows:
                peak = peak_gib(rows[name]) * (1024 if tiny else 1)
                below.bar(x, peak, width * 0.92, color=COLOURS[name])
                below.text(x, peak, f" {peak:.1f}", ha="center", va="bottom", fontsize=7, rotation=90)
        for axis, there, what in ((above, timed, "time"), (below, rows, "memory")):
            if not there:
                waits.append(f"{what} of step-{shape}")
                axis.text(place, 0.03, WAITS, ha="center", va="bottom", fontsize=9, color=QUIET)
    above.axhline(1, color=GREY, linewidth=0.8, zorder=0)
    above.set(ylabel="time, as a share of\ntransformers' plain step", ylim=(0, None))
    below.set(ylabel=f"peak memory, {'MiB' if tiny else 'GiB'}", ylim=(0, None) if measured else (0, 1))
    if not measured:
        below.set_yticks([])
    above.tick_params(labelbottom=True)
    below.set_xticks(range(len(shapes)), [name.replace("-projector", "\nprojector only") for name in shapes])
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in variants]
    handles.append(plt.Line2D([], [], color=BLACK, linewidth=1.8))
    names = [*(LABELS[name] for name in variants), "floor"]
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    return figure, waits


def _times(axis: Any, places: dict[str, float], width: float, rows: dict[str, Any], counted: dict[str, float]) -> None:
    """The bars of one shape, where there are figures, and the floors, which are there in any case."""
    for name, x in places.items():
        floor = counted[name] / counted["hf"]
        if name != "hf":
            axis.plot([x - width * 0.46, x + width * 0.46], [floor, floor], color=BLACK, linewidth=1.8)
        if time := rows.get(name, {}).get("of_hf"):
            axis.bar(x, float(time), width * 0.92, color=COLOURS[name])
            top = max(float(time), floor)
            axis.text(x, top, f" {float(time):.2f}", ha="center", va="bottom", fontsize=7, rotation=90)


def _peaks(rows: Rows) -> dict[str, dict[str, str]]:
    """The rows that have a peak to show. TRL's kernel is Triton: what it holds on a CPU is its fallback's."""
    there = [row for row in rows if row["peak_mib"]]
    return {row["variant"]: row for row in there if row["variant"] != "trl" or on_gpu([row])}


AXES = {"text": "text tokens, mean", "image": "image tokens", "batch": "batch", "vocabulary": "vocabulary"}


def scaling_picture(folder: Path) -> tuple[Any, list[str]]:
    rows = read(folder / "scaling-gpu.csv")
    waits = [] if on_gpu(rows) else ["time of scaling-gpu"]
    rows = rows or read(folder / "scaling-tiny.csv") or _floors_alone()
    figure, panels = plt.subplots(2, 2, figsize=(8, 6.5), layout="constrained", sharey=True)
    lines = {"of_mle": (COLOURS["cal"], "ours CAL / ours plain"), "of_hf": (COLOURS["released"], "ours CAL / hf plain")}
    for panel, (axis, label) in zip(panels.flat, AXES.items(), strict=True):
        here = sorted((row for row in rows if row["axis"] == axis), key=lambda row: int(row["value"]))
        cal = [row for row in here if row["variant"] == "cal"]
        values = [int(row["value"]) for row in cal]
        for key, (colour, _) in lines.items():
            panel.plot(values, [float(row[f"floor_{key}"]) for row in cal], "--", color=colour, linewidth=1.2)
            timed = [(int(row["value"]), float(row[key])) for row in on_gpu(cal) if row[key]]
            panel.plot([x for x, _ in timed], [y for _, y in timed], "o-", color=colour, linewidth=1.8)
        panel.axhline(1, color=GREY, linewidth=0.8, zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.set_xlabel(label)
        if waits:
            panel.set_title(f"time {WAITS}", fontsize=9, color=QUIET)
    for panel in panels[:, 0]:
        panel.set_ylabel("ratio of step times")
    handles = [plt.Line2D([], [], color=colour, marker="o") for colour, _ in lines.values()]
    handles += [plt.Line2D([], [], color=BLACK, linestyle="--")]
    names = [name for _, name in lines.values()] + ["its floor"]
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return figure, waits


def _floors_alone() -> Rows:
    """What the CSV will have in its columns of floors."""
    rows = []
    for axis, values in scaling.AXES["gpu"].items():
        for value in values:
            counted = floors(scaling.at(scaling.GPU, axis, value))
            ratios = {f"floor_of_{other}": str(counted["cal"] / counted[other]) for other in ("hf", "mle")}
            rows.append({"axis": axis, "value": str(value), "variant": "cal", "device": "cpu", **ratios})
    return rows


LOSS_COLOURS = {"naive": GREY, "trl": "#E69F00", "liger": "#CC79A7", "ours-128": "#56B4E9", "ours": "#0072B2"}


def loss_picture(folder: Path) -> tuple[Any, list[str]]:
    """Memory beyond the gradients; flat in N × V is a level line."""
    rows = read(folder / "loss-gpu.csv")
    waits = [] if rows else ["memory of loss-gpu"]
    rows = rows or read(folder / "loss-cpu.csv") or read(folder / "loss-tiny.csv")
    rows = [row for row in rows if row in on_gpu([row]) or row["variant"] != "trl"]
    words = sorted({int(row["vocabulary"]) for row in rows})
    counts = sorted({int(row["rows"]) for row in rows})
    figure, panels = plt.subplots(
        1, max(len(words), 1), figsize=(8, 4.2), layout="constrained", sharey=True, squeeze=False
    )
    shown = [name for name in LOSS_COLOURS if any(row["variant"] == name and row["peak_mib"] for row in rows)]
    for panel, vocabulary in zip(panels.flat, words, strict=False):
        for name in shown:
            line = [row for row in rows if row["variant"] == name and int(row["vocabulary"]) == vocabulary]
            points = [(int(row["rows"]), _beyond(row)) for row in line if row["peak_mib"]]
            panel.plot([x for x, _ in points], [y for _, y in points], "o-", color=LOSS_COLOURS[name], linewidth=1.8)
        panel.set(xscale="log", yscale="log", xlabel="rows", title=f"{vocabulary} words")
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.xaxis.minorticks_off()
    panels[0, 0].set_ylabel("peak beyond the gradients, MiB")
    if not rows:
        panels[0, 0].set(xticks=[], yticks=[], xlabel="rows")
        panels[0, 0].text(0.5, 0.5, WAITS, ha="center", color=QUIET, transform=panels[0, 0].transAxes)
    handles = [plt.Line2D([], [], color=LOSS_COLOURS[name], marker="o") for name in shown]
    where = rows[0]["device"] if rows else ""
    figure.legend(handles, shown, loc="outside upper center", ncols=max(len(shown), 1), frameon=False, title=where)
    return figure, waits


PICTURES = {"step": step_picture, "scaling": scaling_picture, "loss": loss_picture}


def _beyond(row: dict[str, str]) -> float:
    return float(row["peak_mib"]) - float(row["grads_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (benchmarks/results)")
    parser.add_argument("--out", type=Path, default=None, help="folder of the pictures (that of the CSVs)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args()
    out = options.out or options.results
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        figure, waits = picture(options.results)
        path = out / f"{name}.{options.format}"
        figure.savefig(path, dpi=100, metadata={"Date": None} if options.format == "svg" else None)
        plt.close(figure)
        print(f"{path}" + (f": {', '.join(waits)} {WAITS.replace('waits', 'wait')}" if waits else ""))


if __name__ == "__main__":
    main()
