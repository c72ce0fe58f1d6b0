"""Plant mistakes in the code, one at a time, and see whether a test notices:

    python -m scripts.mutants                       # all of them; make mutants
    python -m scripts.mutants core/weighting.py     # those of some files
    python -m scripts.mutants --minutes 20          # as many as fit

Each file of ``tests/mutants`` lists changes of one folder of the source: the text that is there, the text to put in its
place, and whom it would hurt. A change counts as noticed when one of its file's tests fails; the tests of a file are those
that ``tests:`` names, else those of the same name, else all of the folder's. What lives is printed at the end; ``--all``
tries the whole suite on it before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LISTS = ROOT / "tests" / "mutants"
COPIED = ("src", "tests", "examples", "scripts", "docs", "benchmarks", "README.md", "CONTRIBUTING.md", "pyproject.toml")
# A planted change may make a test run for ever
SECONDS = 600


@dataclass(frozen=True)
class Mutant:
    """One planted change: in the file below src/seecal, ``before`` becomes ``after``."""

    file: str
    before: str
    after: str
    hurts: str
    tests: tuple[str, ...]

    def plant(self, root: Path) -> None:
        """Put the change into the tree. ValueError unless ``before`` stands there exactly once."""
        path = root / "src" / "seecal" / self.file
        text = path.read_text("utf8")
        if text.count(self.before) != 1:
            raise ValueError(f"{self.file}: {text.count(self.before)} places with {self.before!r}, not one")
        path.write_text(text.replace(self.before, self.after), "utf8")

    def heal(self, root: Path) -> None:
        """The file as it is in the checkout."""
        shutil.copy(ROOT / "src" / "seecal" / self.file, root / "src" / "seecal" / self.file)


def listed() -> list[Mutant]:
    """All planted changes, in the order of the lists."""
    found = []
    for path in sorted(LISTS.glob("*.yaml")):
        for file, entry in yaml.safe_load(path.read_text("utf8")).items():
            tests = tuple(entry.get("tests") or default_tests(file))
            found += [
                Mutant(file, change["is"], change["becomes"], change["hurts"], tests) for change in entry["changes"]
            ]
    return found


def default_tests(file: str) -> list[str]:
    """The test file of the same name, or the folder's tests where there is none."""
    path = Path("tests") / Path(file).parent / f"test_{Path(file).stem}.py"
    return [str(path)] if (ROOT / path).exists() else [str(path.parent)]


def noticed(mutant: Mutant, root: Path, tests: tuple[str, ...]) -> bool:
    """Whether a test fails once the change is in the copy of the tree at ``root``."""
    mutant.plant(root)
    paths = os.pathsep.join([str(root / "src"), str(root)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return True  # a hang is noticed
    finally:
        mutant.heal(root)
    if done.returncode not in (0, 1, 2):  # passed, failed, could not be imported
        raise RuntimeError(f"{mutant.file}: pytest ended with {done.returncode}: {done.stdout.decode()[-500:]}")
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files below src/seecal; none: all that the lists name")
    parser.add_argument("--workers", type=int, default=2, help="changes tried at a time")
    parser.add_argument("--minutes", type=float, default=None, help="stop planting after so long")
    parser.add_argument("--all", action="store_true", help="try the whole suite on what lives")
    options = parser.parse_args()
    chosen = [mutant for mutant in listed() if not options.files or mutant.file in options.files]
    stop = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    living, tried, lock = [], 0, threading.Lock()
    copies: list[Path] = []

    def try_one(mutant: Mutant) -> None:
        nonlocal tried
        if time.monotonic() > stop:
            return
        with lock:
            root = copies.pop()
        try:
            seen = noticed(mutant, root, mutant.tests)
            seen = seen or (options.all and noticed(mutant, root, ("tests",)))
        finally:
            with lock:
                copies.append(root)
        with lock:
            tried += 1
            if not seen:
                living.append(mutant)
            print(
                f"{tried:4} of {len(chosen)}  {'noticed' if seen else 'LIVES  '}  {mutant.file}: {mutant.hurts}",
                flush=True,
            )

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for number in range(options.workers):
            copies.append(Path(folder) / str(number))
            for name in COPIED:
                source, target = ROOT / name, copies[-1] / name
                copies[-1].mkdir(exist_ok=True)
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(try_one, chosen))
    print(f"\n{tried} planted, {tried - len(living)} noticed ({(tried - len(living)) / max(tried, 1):.1%})")
    for mutant in living:
        print(f"\nlives: {mutant.file}: {mutant.hurts}\n  - {mutant.before!r}\n  + {mutant.after!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
