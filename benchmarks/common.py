"""What every benchmark shares: interleaved rounds, percentiles, peak memory, and a CSV that says what ran where."""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import logging
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seecal.verbosity import Progress

RESULTS = Path(__file__).parent / "results"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported with PEFT, it names a kernel that it would like


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_model() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine() -> dict[str, str]:
    """Device name and versions, for every row of a CSV."""
    import transformers

    import seecal

    cpu = f"cpu ({cpu_model()}, {torch.get_num_threads()} threads)"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seecal": seecal.__version__,
    }


def arguments(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """What every benchmark that measures can be told."""
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds, after one that is not counted")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this time, with three rounds at least")
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")


def lacks(module: str, name: str) -> str | None:
    """Why ``from module import name`` fails, for a row that is left out; None where it works."""
    package = module.split(".")[0]
    try:
        importlib.import_module(package)
    except ImportError:
        return f"{package} is not installed"
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return f"this {package} has no {module}.{name}"
    return None


def progress() -> Progress:
    """Lines every half minute, in a terminal too: a bar would be drawn while something is timed."""
    return Progress(bars=False)


Runs = dict[str, Callable[[], Any]]
_LEAST_ROUNDS = 3


def runnable(variants: Runs, clear: Callable[[], Any] = lambda: None) -> tuple[Runs, dict[str, str]]:
    """Runs each once: those that can, and for the others why not. ``clear`` is called after one that could not.

    One that runs out of memory or fails must not take the others' figures with it.
    """
    notes = {}
    for name, run in variants.items():
        try:
            run()
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
        except Exception as error:
            notes[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if name in notes:  # outside the handler: there the error still holds the tensors of its frames
            clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return {name: run for name, run in variants.items() if name not in notes}, notes


def interleaved(
    variants: Runs, rounds: int, warmup: int = 1, seconds: float | None = None
) -> dict[str, dict[str, float]]:
    """p20, p50, p80 of each variant in ms, and how many rounds they are of."""
    return {name: summary(values) for name, values in round_times(variants, rounds, warmup, seconds).items()}


def round_times(variants: Runs, rounds: int, warmup: int = 1, seconds: float | None = None) -> dict[str, list[float]]:
    """ms of each variant in each round that counts.

    Each round runs every variant once, so that drift of the machine hits all, in an order of its own (:func:`shuffled`).
    ``seconds``: begin no more rounds after that.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    begin = _now()
    with progress() as shown, shown.task("measuring", (warmup + rounds) * len(variants), unit="run") as task:
        for turn in range(warmup + rounds):
            if seconds is not None and turn >= warmup + _LEAST_ROUNDS and _now() - begin > seconds:
                break
            for name in shuffled(variants, turn):
                start = _now()
                variants[name]()
                spent = _now() - start
                task.advance(note=name)
                if turn >= warmup:
                    times[name].append(spent * 1e3)
    return times


def shuffled(names: Iterable[str], turn: int) -> list[str]:
    """The order of a round, drawn by its number: in a fixed one each variant always bears what the one before it leaves
    (memory given back, caches)."""
    found = list(names)
    random.Random(turn).shuffle(found)
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {**percentiles(values), "rounds": len(values)}


def spread(one: list[float], other: list[float]) -> dict[str, float]:
    """p20, p50, p80 of the ratio of two variants, each round's for itself: what slows a whole round falls out of it."""
    found = percentiles([a / b for a, b in zip(one, other, strict=True)])
    return {key.removesuffix("_ms"): value for key, value in found.items()}


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"p20_ms": cuts[1], "p50_ms": cuts[4], "p80_ms": cuts[7]}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib(run: Callable[[], Any]) -> float:
    """MiB that ``run`` allocates at its peak beyond what was there before. On the CPU by watching operators."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _LiveBytes() as live:
        run()
    return live.peak / 2**20


def held_mib(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """MiB that are there before a step: on a GPU all that is allocated, on a CPU the weights and the batch."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 2**20
    return sum(one.nbytes for one in (*model.parameters(), *model.buffers(), *batch.values())) / 2**20


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in inputs:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive and self._alive[key]() is not None:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def write(name: str, rows: list[dict[str, Any]], folder: Path | None = None, show: bool = True) -> Path:
    """Writes the rows as ``<folder>/<name>.csv``, each with the machine it ran on, and prints them."""
    path = (folder or RESULTS) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**row, **machine()} for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if not show:
        return path
    shown = [key for key in rows[0] if key not in machine()]
    width = {key: max(len(key), *(len(_cell(row[key])) for row in rows)) for key in shown}
    print("  ".join(key.rjust(width[key]) for key in shown))
    for row in rows:
        print("  ".join(_cell(row[key]).rjust(width[key]) for key in shown))
    print(f"{', '.join(f'{key} {value}' for key, value in machine().items())}\nwritten to {path}")
    return path


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
