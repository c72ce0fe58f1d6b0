"""The one command that takes every GPU figure:  seecal bench gpu --out DIR

Parts, in order of worth, each in a process of its own: first whether ours is right on this device (check.py), then a step
of every shape, the options, the loss alone, and scaling. A part that fails or runs out of time is a row of ``parts.csv``
and its output a file under ``logs/``; the next one runs all the same. Then the verdicts (targets.py) as ``summary.csv``,
and the pictures. A run that is cut off leaves what it has.

``--tiny`` runs all of it at tiny shapes, on a CPU in under a minute: the same code, no figures.
Exit code 1 if a part failed or the check found something off.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from targets import OF_HF, verdicts

from seecal.verbosity import Progress

HERE = Path(__file__).parent
EXTRA = "mle,cal,cal-fp8,cal-every-4"
_LEAST_SECONDS = 15  # a part that has less than this left is not begun: loading alone takes that long


@dataclass
class Part:
    """A script and its arguments. ``seconds``: after these it begins no more rounds; loading comes on top."""

    name: str
    arguments: list[str]
    seconds: float
    outcome: str = "not begun: time was up"
    spent: float = 0.0
    note: str = ""


def parts(tiny: bool, rounds: int) -> list[Part]:
    many = ["--rounds", str(rounds)]
    if tiny:
        return [
            Part("check", ["check", "--size", "tiny"], 60),
            *(Part(f"step-{name}", ["step", "--shape", name, *many], 60) for name in ("tiny", "tiny-projector")),
            Part("options", ["step", "--shape", "tiny", "--name", "options-tiny", "--variants", EXTRA, *many], 60),
            Part("loss", ["loss", "--size", "tiny", *many], 60),
            Part("scaling", ["scaling", "--size", "tiny", *many], 60),
        ]
    shape = next(iter(OF_HF))
    return [
        Part("check", ["check", "--size", "gpu"], 30),
        *(Part(f"step-{name}", ["step", "--shape", name, *many], 50) for name in OF_HF),
        Part("options", ["step", "--shape", shape, "--name", "options", "--variants", EXTRA, *many], 30),
        Part("loss", ["loss", "--size", "gpu", *many], 40),
        Part("scaling", ["scaling", "--size", "gpu"], 60),
    ]


def run(part: Part, folder: Path, left: float) -> None:
    """Runs it within ``left`` seconds and notes how it went."""
    # A part stops by itself after the time it measures in; what it needs to load comes on top, up to all that is left.
    soft = min(part.seconds, max(left - 2 * _LEAST_SECONDS, 1))
    script, *rest = part.arguments
    command = [sys.executable, str(HERE / f"{script}.py"), *rest, "--seconds", str(round(soft)), "--out", str(folder)]
    log = folder / "logs" / f"{part.name}.log"
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False).returncode
            part.outcome = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            part.outcome = "cut off: time was up"
    part.spent = time.monotonic() - begin
    lines = log.read_text(encoding="utf-8").splitlines()
    if part.outcome != "done" and lines:
        part.note = lines[-1]
    print(f"{part.name}: {part.outcome} after {part.spent:.0f} s {part.note}", flush=True)
    print("\n".join(f"    {line}" for line in lines[-12:]), flush=True)


def note_parts(all_parts: list[Part], folder: Path) -> None:
    rows = [
        {"part": one.name, "outcome": one.outcome, "seconds": f"{one.spent:.0f}", "note": one.note} for one in all_parts
    ]
    _write(folder / "parts.csv", rows)


def summary(folder: Path) -> None:
    rows = [verdict.row() for verdict in verdicts(folder)]
    _write(folder / "summary.csv", rows)
    width = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in width}, *rows]:
        print("  ".join(row[key].ljust(width[key]) for key in row).rstrip())


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSVs, logs and pictures")
    parser.add_argument("--minutes", type=float, default=9.0, help="end after this time, whatever is still to do")
    parser.add_argument("--rounds", type=int, default=None, help="of each part (5; 1 with --tiny)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--parts", default=None, help="only these, comma-separated, as parts.csv names them")
    options = parser.parse_args()
    all_parts = parts(options.tiny, options.rounds or (1 if options.tiny else 5))
    if options.parts:
        wanted, known = set(options.parts.split(",")), {part.name for part in all_parts}
        if wanted - known:
            parser.error(
                f"--parts: there is no {', '.join(sorted(wanted - known))}; there are {', '.join(sorted(known))}"
            )
        all_parts = [part for part in all_parts if part.name in wanted]
    if not options.tiny:
        import torch  # not above: with --tiny this process does without it

        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here; --tiny runs everything at tiny shapes on a CPU")
    end = time.monotonic() + options.minutes * 60
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    with Progress(bars=False) as shown, shown.task("bench gpu", len(all_parts), unit="part") as task:
        for part in all_parts:
            left = end - time.monotonic()
            if left >= _LEAST_SECONDS:
                run(part, options.out, left)
            note_parts(all_parts, options.out)
            task.advance()
    summary(options.out)
    drawn = subprocess.run([sys.executable, str(HERE / "plot.py"), "--results", str(options.out)], check=False)
    print(f"everything is under {options.out}")
    sys.exit(drawn.returncode or any(part.outcome != "done" for part in all_parts))


if __name__ == "__main__":
    main()
