"""The experiments of docs/evidence.md: runs what has no row in experiments/results yet, in pieces of some minutes.

    seecal bench evidence --plan                what all of it takes, and what was cut
    seecal bench evidence NAME                  30 minutes of it on two cores; again to go on
    python -m experiments.evidence              the page, from the rows

One run is one row, appended when it is whole; alignments are kept in .cache/evidence. Ctrl-C loses the runs that are going.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # experiments/ is no part of the package


def main() -> int:
    from experiments import designs, runner

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(designs.names())}")
    parser.add_argument("--plan", action="store_true", help="run nothing; runs times minutes, and what was cut")
    parser.add_argument("--minutes", type=float, default=30, help="stop after so many (30)")
    parser.add_argument("--workers", type=int, default=2, help="processes, each on one core (2)")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="how long trainings are")
    parser.add_argument("--steps", type=int, default=None, help="at most so many of everything, to see that it runs")
    parser.add_argument(
        "--runs", type=int, default=None, help="only the first so many that are missing, of one alignment"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the rows (experiments/results)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "evidence", help="folder of the alignments")
    options = parser.parse_args()
    scale = runner.Scale(options.scale, options.steps)
    if options.plan:
        print(runner.planned(options.out or runner.RESULTS, scale))
        return 0
    if options.name is None:
        parser.error("which experiment? or --plan")
    if options.out is None and (options.steps is not None or options.scale != "cpu"):
        parser.error("rows of --steps or --scale gpu do not belong to the committed ones: give a folder, --out DIR")
    if options.minutes <= 0 or options.workers < 1 or (options.runs is not None and options.runs < 1):
        parser.error("--minutes must be above 0, --workers and --runs at least 1")
    try:
        return runner.run(
            options.name, options.out or runner.RESULTS, options.cache, scale=scale, minutes=options.minutes,
            workers=options.workers, first=options.runs, say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
