"""Plant mistakes in the code, one at a time, and see whether a test notices:

    python -m scripts.mutants                       # all of them; make mutants
    python -m scripts.mutants core/weighting.py     # those of some files, or of a folder: core
    python -m scripts.mutants --minutes 20          # as many as fit
    python -m scripts.mutants --check               # only whether each still fits into its file

Each file of ``tests/mutants`` lists changes of one folder of the source: the text that is there, the text to put in its
place, and whom it would hurt. A change counts as noticed when one of its file's tests fails; the tests of a file are those
that ``tests:`` names, else those of the same name, else all of the folder's. What lives is printed at the end; ``--all``
tries the whole suite on it before.

The libraries are imported once, and each change is tried in a fork: importing them takes longer than most tests.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
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

    def fits(self) -> str:
        """Empty, or why the change cannot be planted: ``before`` must stand in the file exactly once."""
        path = ROOT / "src" / "seecal" / self.file
        if not path.exists():
            return f"{self.file}: no such file"
        places = path.read_text("utf8").count(self.before)
        return "" if places == 1 else f"{self.file}: {places} places with {self.before!r}, not one"

    def plant(self, root: Path) -> None:
        """Put the change into the tree."""
        path = root / "src" / "seecal" / self.file
        path.write_text(
            (ROOT / "src" / "seecal" / self.file).read_text("utf8").replace(self.before, self.after), "utf8"
        )

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


class Trials:
    """Runs tests on planted changes, each in a fork of this process, ``workers`` at a time.

    Args:
        workers: how many copies of the tree there are.
        folder: where they go.
    """

    def __init__(self, workers: int, folder: Path) -> None:
        self._free = [folder / str(number) for number in range(workers)]
        self._running: dict[int, tuple[Mutant, Path, float]] = {}
        for root in self._free:
            root.mkdir(parents=True)
            for name in COPIED:
                source = ROOT / name
                shutil.copytree(source, root / name) if source.is_dir() else shutil.copy2(source, root / name)

    def start(self, mutant: Mutant, tests: tuple[str, ...]) -> None:
        """Begin, once a copy of the tree is free (:meth:`wait`)."""
        root = self._free.pop()
        mutant.plant(root)
        child = os.fork()
        if not child:
            _run_tests(root, tests)
        self._running[child] = (mutant, root, time.monotonic())

    @property
    def full(self) -> bool:
        return not self._free

    def wait(self) -> tuple[Mutant, bool] | None:
        """(a change, whether its tests noticed), once one of those that run has ended; None when none runs.

        Raises:
            RuntimeError: pytest could not run the tests at all.
        """
        while self._running:
            for child, (mutant, root, begun) in list(self._running.items()):
                ended, status = os.waitpid(child, os.WNOHANG)
                hangs = not ended and time.monotonic() - begun > SECONDS
                if hangs:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                if not ended and not hangs:
                    continue
                del self._running[child]
                mutant.heal(root)
                self._free.append(root)
                code = os.waitstatus_to_exitcode(status) if ended else 1  # a hang is noticed, and so is a crash
                if code not in (0, 1, 2) and code > 0:  # passed, failed, could not be imported
                    raise RuntimeError(f"{mutant.file}: pytest ended with {code}:\n{(root / 'log').read_text()[-900:]}")
                return mutant, code != 0
            time.sleep(0.2)
        return None


def _run_tests(root: Path, tests: tuple[str, ...]) -> None:
    """In the fork: pytest on the copy of the tree, and out."""
    code = 3
    try:
        os.setpgid(0, 0)  # so that a hang can be ended together with what it has started
        log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(root)
        own = [str(root / "src"), str(root)]
        others = {str(ROOT), str(ROOT / "src"), ""}
        sys.path[:] = own + [path for path in sys.path if path not in others]
        sys.dont_write_bytecode = True  # two changes of one length in one second would look the same
        os.environ.update(PYTHONPATH=os.pathsep.join(own), PYTHONDONTWRITEBYTECODE="1")
        for name in [name for name in sys.modules if name.split(".")[0] in ("scripts", "seecal", "tests")]:
            del sys.modules[name]
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _import_libraries() -> None:
    """What nearly every test imports. Nothing of seecal, and no thread may be started."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import trl
    from PIL import Image  # noqa: F401
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration  # noqa: F401

    trl.SFTTrainer  # noqa: B018  # imported when it is first named
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files or folders below src/seecal; none: all that the lists name")
    parser.add_argument("--match", default="", help="only those that hurt what this regular expression finds")
    parser.add_argument("--workers", type=int, default=2, help="changes tried at a time")
    parser.add_argument("--minutes", type=float, default=None, help="stop planting after so long")
    parser.add_argument("--all", action="store_true", help="try the whole suite on what lives")
    parser.add_argument("--check", action="store_true", help="run no test: only say which changes do not fit")
    options = parser.parse_args()
    asked = [name.rstrip("/") for name in options.files]
    chosen = [
        mutant
        for mutant in listed()
        if not asked or any(mutant.file == name or mutant.file.startswith(name + "/") for name in asked)
        if re.search(options.match, mutant.hurts)
    ]
    wrong = [why for why in (mutant.fits() for mutant in chosen) if why]
    for why in wrong:
        print(f"does not fit: {why}")
    if wrong or options.check:
        print(f"{len(chosen)} listed, {len(chosen) - len(wrong)} fit")
        return 1 if wrong else 0
    _import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trials = Trials(options.workers, Path(folder))
        stop = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        tried, living = _tried(trials, chosen, stop)
        if options.all:
            _, living = _tried(trials, living, float("inf"), ("tests",))
    print(f"\n{tried} planted, {tried - len(living)} noticed ({(tried - len(living)) / max(tried, 1):.1%})")
    for mutant in living:
        print(f"\nlives: {mutant.file}: {mutant.hurts}\n  - {mutant.before!r}\n  + {mutant.after!r}")
    return 0


def _tried(trials: Trials, chosen: list[Mutant], stop: float, tests: tuple[str, ...] = ()) -> tuple[int, list[Mutant]]:
    """(how many were tried before ``stop``, those that no test noticed), a line each."""
    waiting, living, tried = list(chosen), [], 0
    while True:
        while waiting and not trials.full and time.monotonic() < stop:
            mutant = waiting.pop(0)
            trials.start(mutant, tests or mutant.tests)
        ended = trials.wait()
        if ended is None:
            return tried, living
        mutant, noticed = ended
        tried += 1
        living += [] if noticed else [mutant]
        word = "noticed" if noticed else "LIVES  "
        print(f"{tried:4} of {len(chosen)}  {word}  {mutant.file}: {mutant.hurts}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
