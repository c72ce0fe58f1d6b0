"""Write the tables of docs/performance.md from benchmarks/results/*.csv, the floors and a tiny step on the CPU:

    python -m scripts.performance_table

Run it from the root of the repository when figures were taken, or when what a step computes has changed. A cell without its
CSV says that it waits.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import targets  # noqa: E402
from common import RESULTS  # noqa: E402
from flops import floors, ladder, work_of  # noqa: E402
from shapes import CPU_SHAPES, GPU_SHAPES, SHAPES, draw  # noqa: E402
from step import measure  # noqa: E402
from targets import WAITS, Rows, cpu_limit, cpu_steps, on_gpu, peak_gib, read, steps, verdicts  # noqa: E402
from variants import ON_CPU  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
LABELS = {**targets.LABELS, "cal": f"**{targets.LABELS['cal']}**"}
MAIN = ("hf", "trl", "liger", "released", "mle", "cal-padded", "cal")
NOT_YET = "not measured yet"
ARMS = {
    "sft": "SFTTrainer",
    "mle": "CALTrainer, plain",
    "cal": "**CALTrainer**",
    "weights": "CALTrainer, weights measured before",
}
COUNTED = ("hf", "released", "cal-padded", "cal")
Table = list[list[str]]


def cpu_table(folder: Path) -> Table:
    """One row a shape, for each CPU that measured it: ratios to hf's step with their spread, and the floors."""
    titles = [LABELS[name] for name in ON_CPU]
    table = [["shape", *titles, "limit of ours CAL", "taken on"]]
    for shape in CPU_SHAPES:
        counted = floors(CPU_SHAPES[shape])
        floor = {name: counted[name] / counted["hf"] for name in ON_CPU}
        for rows in cpu_steps(folder, shape) or [{}]:
            cells = [_cpu_cell(name, rows.get(name, {}), floor[name]) for name in ON_CPU]
            table.append([shape, *cells, _cpu_verdict(rows, cpu_limit(floor["cal"])), _cpu_device(rows)])
    return table


def _cpu_cell(name: str, row: dict[str, str], floor: float) -> str:
    measured = bool(row.get("p50_ms"))
    if name == "hf":
        return f"{float(row['p50_ms']) / 1e3:.1f} s" if measured else row.get("note") or NOT_YET
    if not measured:
        return f"{row.get('note') or NOT_YET}; floor {floor:.3f}×"
    middle, low, high = (float(row[f"of_hf_{name}"]) for name in ("p50", "p20", "p80"))
    return f"{middle:.3f}× ({low:.3f} to {high:.3f}); floor {floor:.3f}×"


def _cpu_verdict(rows: Rows, limit: float) -> str:
    measured = rows.get("cal", {}).get("of_hf_p50")
    word = f": {'met' if float(measured) <= limit else 'missed'}" if measured else ""
    return f"{limit:.3f}×{word}"


def _cpu_device(rows: Rows) -> str:
    row = next(iter(rows.values()), None)
    return f"{row['device']}, {rows['hf']['rounds']} rounds, torch {row['torch']}" if row else NOT_YET


def cpu_memory_table(folder: Path) -> Table:
    """Peak beyond the weights and the batch, as a CPU's operators ask for it: one row where several CPUs agree."""
    table = [["MiB beyond weights and batch", *(LABELS[name] for name in ON_CPU)]]
    for shape in CPU_SHAPES:
        for rows in cpu_steps(folder, shape) or [{}]:
            peaks = [rows.get(name, {}).get("peak_mib") for name in ON_CPU]
            row = [shape, *(f"{float(peak):,.0f}" if peak else NOT_YET for peak in peaks)]
            table += [] if row in table else [row]
    return table


def trainer_table(folder: Path) -> Table:
    """Whole trainings, the loader included."""
    table = [["trainer", "samples a second", "time of SFTTrainer's", "waiting for data", "peak MiB", "of its workers"]]
    found = {row["variant"]: row for row in read(folder / "trainer-cpu.csv")}
    for arm, label in ARMS.items():
        row = found.get(arm)
        if row is None:
            table.append([label, *[NOT_YET] * (len(table[0]) - 1)])
            continue
        middle, low, high = (float(row[f"of_sft_{name}"]) for name in ("p50", "p20", "p80"))
        speed, slow, fast = (float(row[f"samples_per_s_{name}"]) for name in ("p50", "p20", "p80"))
        cells = [f"{speed:.1f} ({slow:.1f} to {fast:.1f})", f"{middle:.3f}× ({low:.3f} to {high:.3f})"]
        cells.append(f"{100 * float(row['wait_share_p50']):.1f} %")
        table.append([label, *cells, *(f"{float(row[f'{name}_p50']):,.0f}" for name in ("peak_mib", "workers_mib"))])
    return table


def time_table(folder: Path) -> Table:
    """Ratios to hf's median; its own in ms."""
    found = {shape: steps(folder, shape) for shape in GPU_SHAPES}

    def cell(shape: str, name: str) -> str:
        row = found[shape].get(name, {})
        if not row.get("p50_ms"):
            return row.get("note") or WAITS
        return f"{float(row['p50_ms']):.0f} ms" if name == "hf" else f"{float(row['of_hf']):.3f}×"

    return [["step", *GPU_SHAPES], *([LABELS[name], *(cell(shape, name) for shape in GPU_SHAPES)] for name in MAIN)]


def memory_table(folder: Path) -> Table:
    found = {shape: steps(folder, shape) for shape in GPU_SHAPES}

    def cell(shape: str, name: str) -> str:
        row = found[shape].get(name, {})
        peak = peak_gib(row)
        return (row.get("note") or WAITS) if peak is None else f"{peak:.1f}"

    return [["GiB", *GPU_SHAPES], *([LABELS[name], *(cell(shape, name) for shape in GPU_SHAPES)] for name in MAIN)]


def target_table(folder: Path) -> Table:
    rows = [verdict.row() for verdict in verdicts(folder)]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def option_table(folder: Path) -> Table:
    rows = {row["variant"]: row for row in on_gpu(read(folder / "options.csv"))}
    table = [["step", "of ours plain", "floor"]]
    counted = floors(GPU_SHAPES["llava-1.5-7b"])
    for name in ("cal", "cal-fp8", "cal-every-4"):
        row = rows.get(name, {})
        measured = f"{float(row['of_mle']):.3f}×" if row.get("of_mle") else row.get("note") or WAITS
        table.append([LABELS[name], measured, f"{counted[name] / counted['mle']:.3f}×"])
    return table


def weight_table(folder: Path) -> Table:
    """What rounding does to Δ and the weights: measured on a CPU, where it is the same rounding."""
    table = [
        ["model", "passes", "mean error of Δ, logits", "mean error of the weights", "largest", "moved by over 0.1"]
    ]
    for row in read(folder / "weights.csv"):
        if row["way"] != "float32":
            share = f"{100 * float(row['share_moved_by_a_tenth']):.0f} %"
            errors = [
                f"{float(row[name]):.2f}" for name in ("delta_error_mean", "weight_error_mean", "weight_error_max")
            ]
            table.append([row["model"], row["way"], *errors, share])
    return table


def device_table(folder: Path) -> Table:
    found: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(folder.glob("*.csv")):
        for row in on_gpu(read(path)):
            names = found.setdefault((row["device"], row["torch"], row["transformers"]), [])
            if path.stem not in names:
                names.append(path.stem)
    table = [["device", "torch", "transformers", "figures"]]
    return table + ([[*key, ", ".join(names)] for key, names in found.items()] or [[WAITS, "", "", "none yet"]])


def batch_table() -> Table:
    table = [["", *GPU_SHAPES]]
    works = {name: work_of(draw(shape)[0]) for name, shape in GPU_SHAPES.items()}
    lines = {
        "batch": [str(shape.batch) for shape in GPU_SHAPES.values()],
        "image tokens a sample": [str(shape.image_tokens) for shape in GPU_SHAPES.values()],
        "tokens, real / padded": [f"{sum(work.rows)} / {sum(work.padded)}" for work in works.values()],
        "text tokens, real / padded": [f"{sum(work.text)} / {sum(work.padded_text)}" for work in works.values()],
        "of those, after the image": [str(sum(work.after)) for work in works.values()],
        "label rows": [str(work.labels) for work in works.values()],
        "TFLOP of hf's step": [f"{floors(shape)['hf'] / 1e12:.0f}" for shape in GPU_SHAPES.values()],
    }
    return table + [[name, *cells] for name, cells in lines.items()]


def floor_table() -> Table:
    counted = [floors(shape) for shape in GPU_SHAPES.values()]
    table = [["floor", *GPU_SHAPES]]
    table.append(["**ours CAL / ours plain**", *(f"**{one['cal'] / one['mle']:.3f}×**" for one in counted)])
    for name in ("trl", "released", "mle", "cal-padded", "cal"):
        table.append([f"{LABELS[name]} / hf", *(f"{one[name] / one['hf']:.3f}×" for one in counted)])
    return table


def ladder_table() -> Table:
    rungs = [ladder(shape) for shape in GPU_SHAPES.values()]
    return [["computed, of hf", *GPU_SHAPES], *([name, *(f"{one[name]:.3f}×" for one in rungs)] for name in rungs[0])]


def count_table() -> Table:
    """Measured on the CPU, where counts and bytes mean something: tiny LLaVA, batch of 4."""
    work = work_of(draw(SHAPES["tiny"])[0])
    head = dict.fromkeys(COUNTED, str(work.labels)) | {
        "hf": str(sum(work.padded)),
        "released": f"{sum(work.padded)} + {sum(work.padded)}",
    }
    table = [["step", "decoder tokens, main + contrast", "head rows", "peak MiB"]]
    for row in measure(SHAPES["tiny"], list(COUNTED), 1, None)[0]:
        name = row["variant"]
        tokens = f"{row['main_tokens']} + {row['contrast_tokens']}"
        table.append([LABELS[name], tokens, head[name], f"{row['peak_mib']:.1f}"])
    return table


def tables(folder: Path) -> dict[str, Table]:
    """Every table but that of the counts, which takes a run: name of its marker -> rows, the header first."""
    return {
        "cpu": cpu_table(folder),
        "cpu memory": cpu_memory_table(folder),
        "trainers": trainer_table(folder),
        "batches": batch_table(),
        "floors": floor_table(),
        "times": time_table(folder),
        "memory": memory_table(folder),
        "targets": target_table(folder),
        "options": option_table(folder),
        "weights": weight_table(folder),
        "devices": device_table(folder),
        "ladder": ladder_table(),
    }


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: python -m scripts.performance_table -->", f"<!-- end of {name} -->"


def written(text: str, name: str) -> Table:
    """The rows that the page has now, the header first."""
    begin, end = markers(name)
    header, _, *lines = text.split(begin)[1].split(end)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]


def with_table(text: str, name: str, rows: Table) -> str:
    """The page with these rows in place of its own."""
    begin, end = markers(name)
    before, after = text.split(begin)[0], text.split(end)[1]
    lines = [f"| {' | '.join(line)} |" for line in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join([before + begin, *lines, end + after])


if __name__ == "__main__":
    page = PAGE.read_text("utf8")
    for name, rows in {**tables(RESULTS), "counts": count_table()}.items():
        page = with_table(page, name, rows)
    PAGE.write_text(page, "utf8")
