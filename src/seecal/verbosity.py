"""What is printed: how far a long command is, and libraries that keep quiet while a command of ours talks.

Imports neither torch nor transformers at the top: every command loads this file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# Half a minute is what is promised; a busy machine may be some seconds late.
SECONDS_BETWEEN_LINES = 25.0
# Control characters, which a terminal obeys, and those that turn the direction of what follows
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def written_out(text: str) -> str:
    """``text`` with control characters and changes of direction written out; lines and tabs stay, nothing is escaped.

    >>> written_out("a\\x1b[31mb")
    'a⟨U+001B⟩[31mb'
    """
    return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def say(text: str) -> None:
    """Print what may hold names and texts of data: a terminal shows them and obeys none."""
    print(written_out(text))


def quiet() -> None:
    """Stop the libraries' progress bars and notices; warnings stay errors' business."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("accelerate", "trl", "torch", "huggingface_hub", "seecal", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_training() -> None:
    """No progress bars of single files, no deprecations that only a library's caller can mend."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # PEFT imports it for every adapter; a kernel it would like


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Swallow what a library prints to stderr although its progress bars are off (transformers' GGUF reader does)."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


class Progress:
    """How far a long command is: bars in a terminal; elsewhere plain lines, at least one every 30 seconds.

        with Progress() as progress, progress.task("stage 1 of 2", total=15, unit="step") as task:
            for loss in steps():
                task.advance(note=f"loss {loss:.2f}")

    Without a terminal that writes ``stage 1 of 2: step 7 of 15, 0:48 left, loss 0.69``, flushed, so that it can be
    followed in a file. A thread writes the line where one step takes longer than that.

    Args:
        console: a rich console; None: one on stdout.
        bars: whether to draw bars; None: if the console is a terminal.
        shown: False: say nothing at all (all ranks but the first).
        clock: seconds, for tests.
    """

    def __init__(
        self,
        console: Any = None,
        *,
        bars: bool | None = None,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self.console = Console() if console is None else console
        self.shown, self.clock = shown, clock
        self.bars = _bars(self.console) if shown and (self.console.is_terminal if bars is None else bars) else None
        self._running: list[Task] = []
        self._said = clock()
        self._lock = threading.RLock()
        self._over = threading.Event()

    def __enter__(self) -> Progress:
        if self.bars is not None:
            self.bars.start()
        elif self.shown:
            self._over.clear()
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.bars is not None:
            self.bars.stop()

    @contextlib.contextmanager
    def task(self, name: str, total: int | None = None, *, unit: str = "", done: int = 0) -> Iterator[Task]:
        """One thing to do. ``total``: how many units, None where that is not known; ``done``: those of an earlier run."""
        task = self.start(name, total, unit=unit, done=done)
        try:
            yield task
        finally:
            task.end()

    def start(self, name: str, total: int | None = None, *, unit: str = "", done: int = 0) -> Task:
        """As :meth:`task`, for callers that cannot use a ``with``: they call ``end()``."""
        task = Task(self, name, total, unit, done)
        with self._lock:
            self._running.append(task)
            if total is not None:
                self._say(f"{name}: {total} {unit}{'s' if unit and total != 1 else ''}".rstrip())
        return task

    def tick(self) -> None:
        """Say how far the innermost task is if nothing has been said for a while."""
        with self._lock:
            if self._running and self.clock() - self._said >= SECONDS_BETWEEN_LINES:
                self._say(self._running[-1].line())

    def _beat(self) -> None:
        while not self._over.wait(1.0):
            self.tick()

    def _say(self, line: str) -> None:
        if self.shown and self.bars is None:
            self._said = self.clock()
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Task:
    """One thing that a long command does; made by :meth:`Progress.task`."""

    def __init__(self, progress: Progress, name: str, total: int | None, unit: str, done: int) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._progress, self._first, self._note = progress, done, ""
        self._begin = progress.clock()
        bars = progress.bars
        self._bar = None if bars is None else bars.add_task(name, total=total, completed=done, note="")

    def advance(self, by: int = 1, note: str | None = None) -> None:
        """``by`` more units are done; ``note`` stands behind them from now on."""
        with self._progress._lock:
            self.done += by
            self._note = self._note if note is None else note
            if self._progress.bars is not None:
                self._progress.bars.update(self._bar, advance=by, note=self._note)
            self._progress.tick()

    def end(self) -> None:
        """Nothing more comes; a second call does nothing."""
        with self._progress._lock:
            if self not in self._progress._running:
                return
            self._progress._running.remove(self)
            if self._progress.bars is not None:
                if self.total is None:
                    self._progress.bars.remove_task(self._bar)
                else:
                    self._progress.bars.stop_task(self._bar)
            elif self.total is not None:
                self._progress._say(self._join(f"{self._count()} in {_clock_time(self._spent())}"))

    def line(self) -> str:
        """Name, how far, time left, note."""
        if self.total is None:
            return self._join(f"{_clock_time(self._spent())} so far")
        new = self.done - self._first
        left = f"{_clock_time(self._spent() / new * (self.total - self.done))} left" if new > 0 else ""
        return self._join(", ".join(part for part in (self._count(), left) if part))

    def _count(self) -> str:
        return f"{self.unit} {self.done} of {self.total}".lstrip()

    def _join(self, how_far: str) -> str:
        return f"{self.name}: {how_far}" + (f", {self._note}" if self._note else "")

    def _spent(self) -> float:
        return self._progress.clock() - self._begin


def _bars(console: Any) -> Any:
    """rich's bars with our columns; in a narrow terminal the note is cut, not the times."""
    from rich import progress as rich
    from rich.table import Column

    def column(width: int) -> Column:
        return Column(no_wrap=True, min_width=width)

    name = rich.TextColumn("{task.description}", markup=False, table_column=column(24))
    count = rich.TextColumn("{task.completed}/{task.total}", table_column=column(7))
    times = rich.TimeElapsedColumn(column(7)), rich.TextColumn("left"), rich.TimeRemainingColumn(table_column=column(7))
    note = rich.TextColumn("{task.fields[note]}", markup=False)
    return rich.Progress(name, rich.BarColumn(bar_width=10), count, *times, note, console=console)


def _clock_time(seconds: float) -> str:
    """
    >>> _clock_time(75), _clock_time(3725)
    ('1:15', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
