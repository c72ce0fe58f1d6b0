"""A training that makes no progress: every rank writes its stacks and ends, with an exit code of its own.

Progress is a micro-batch that has come or gone, a batch of an evaluation, each part of a save. A thread watches
it, so that a process that waits in a collective, for a worker or for a file is seen too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from trl import SFTTrainer

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: the same command, with the last checkpoint, may well work
HANG_EXIT_CODE = 75
_TICKS = 20  # looks at the clock before the time is over
_TICKS_TO_BE_SEEN = 6
_LONGEST_TICK, _LONGEST_WAIT = 5.0, 10.0  # seconds
_TO_CHILDREN = getattr(signal, "SIGUSR2", None)


class Watchdog:
    """Ends the process when nothing beats for ``seconds`` while it is watched.

    What is counted are looks at the clock, none for more than two ticks: the time in which a machine or a process was
    stopped is not held against it.

    Args:
        seconds: without progress; 0: nothing is watched.
        folder: ``hang-rank-R.txt`` is written there. A rank that finds another's file writes its own at once.
        rank: of this process.
        leave: what ends the process, given the exit code.
    """

    def __init__(self, seconds: float, folder: Path, rank: int, leave: Callable[[int], Any] = os._exit) -> None:
        self.seconds, self._folder, self._rank, self._leave = seconds, folder, rank, leave
        self._beats, self._last = 0, "nothing yet"
        self.held = False  # until the next beat: what comes before it may take as long as it likes
        self._depth = 0
        self._stop = threading.Event()

    def beat(self, what: str) -> None:
        """There was progress: ``what``."""
        self._beats, self._last, self.held = self._beats + 1, what, False

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Inside the block, which begins with ``what``, the process is watched. Blocks may stand in each other."""
        self.beat(what)
        self._depth += 1
        thread = None
        with contextlib.ExitStack() as stack:
            if self._depth == 1 and self.seconds > 0:
                self._stop = threading.Event()
                before = self._files()
                workers = stack.enter_context(_stacks_of_workers())
                thread = threading.Thread(
                    target=self._watch, args=(self._stop, before, workers), daemon=True, name="seecal-hangs"
                )
                thread.start()
            try:
                yield
            finally:
                self._depth -= 1
                self.beat(f"end of {what}")
                if thread is not None:
                    self._stop.set()
                    thread.join()

    def _watch(self, stop: threading.Event, before: set[tuple[str, int]], workers: TextIO | None) -> None:
        tick = min(self.seconds / _TICKS, _LONGEST_TICK)
        seen, idle, last = self._beats, 0.0, time.monotonic()
        while not stop.wait(tick):
            now = time.monotonic()
            idle, last = idle + min(now - last, 2 * tick), now
            if seen != self._beats or self.held:
                seen, idle = self._beats, 0.0
            if idle >= self.seconds:
                self._end(f"no progress for {self.seconds:g} s (hang_timeout)", workers)
            elif others := sorted(name for name, _ in self._files() - before):
                self._end(f"{others[0]} says that another rank makes no progress", workers)

    def _files(self) -> set[tuple[str, int]]:
        """Those that say that a rank hangs, with their times: an earlier run may have left some."""
        with contextlib.suppress(OSError):
            return {(one.name, one.stat().st_mtime_ns) for one in self._folder.glob("hang-rank-*.txt")}
        return set()

    def _end(self, why: str, workers: TextIO | None) -> None:
        path = self._folder / f"hang-rank-{self._rank}.txt"
        head = (
            f"seecal: rank {self._rank} (pid {os.getpid()}): {why}; the last was: {self._last}. Its stacks are below; it "
            f"ends with exit code {HANG_EXIT_CODE}.\n"
        )
        of_workers = _ask_workers(workers)
        with contextlib.suppress(OSError):  # a full disk, a file system that is gone: stderr has it too
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf8") as file:
                _write(file, head, of_workers)
        with contextlib.suppress(OSError, ValueError):
            _write(sys.__stderr__ or sys.stderr, head, of_workers)
        # The others see this rank's file within a tick or two; were it gone before, their collectives would fail instead
        time.sleep(min(_LONGEST_WAIT, _TICKS_TO_BE_SEEN * self.seconds / _TICKS))
        for child in multiprocessing.active_children():
            child.kill()  # one that hangs would stay when this process is gone
        self._leave(HANG_EXIT_CODE)


def _write(file: TextIO, head: str, of_workers: str) -> None:
    file.write(head)
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    file.write(of_workers)
    file.flush()


@contextlib.contextmanager
def _stacks_of_workers() -> Iterator[TextIO | None]:
    """Processes that are forked inside the block, as workers of data loaders are, write their stacks into the file when
    they get SIGUSR2. None where that signal is somebody else's, or Python does not allow it."""
    if _TO_CHILDREN is None or signal.getsignal(_TO_CHILDREN) != signal.SIG_DFL:
        yield None
        return
    with tempfile.TemporaryFile("w+", encoding="utf8", errors="replace") as file:
        faulthandler.register(_TO_CHILDREN, file, all_threads=True)
        try:
            yield file
        finally:
            faulthandler.unregister(_TO_CHILDREN)


def _ask_workers(file: TextIO | None) -> str:
    """The stacks of this process's workers, as text."""
    children = multiprocessing.active_children()
    if file is None or not children:
        return ""
    text = ""
    for child in children:
        file.seek(0)
        file.truncate()
        with contextlib.suppress(OSError, TypeError):
            os.kill(child.pid, _TO_CHILDREN)  # type: ignore[arg-type]
        time.sleep(0.2)
        file.seek(0)
        text += f"\n{child.name} (pid {child.pid}):\n{file.read()}"
    return text


class WatchedTrainer(SFTTrainer):
    """Where Trainer makes progress, the watchdog of ``hang_timeout`` hears of it."""

    @property
    def watchdog(self) -> Watchdog:
        """A callback that works for longer than ``hang_timeout`` says so: ``trainer.watchdog.beat("what it has done")``."""
        found = self.__dict__.get("_watchdog")
        if found is None:
            args: Any = self.args
            found = Watchdog(args.hang_timeout, Path(args.output_dir), args.process_index)
            if args.world_size > 1 and args.hang_timeout >= args.ddp_timeout:
                logger.warning(
                    "hang_timeout=%g is not below ddp_timeout=%g: torch ends the ranks that wait before they write stacks",
                    args.hang_timeout,
                    args.ddp_timeout,
                )
            self.__dict__["_watchdog"] = found
        return found

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.watchdog.watching("the start of the training"):
            # A stream is read again up to where it stopped, and nobody can tell how far that is
            self.watchdog.held = bool(kwargs.get("resume_from_checkpoint"))
            return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        return super().get_batch_samples(self._beating(epoch_iterator), num_batches, device)

    def _beating(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.watchdog.beat(f"a micro-batch of step {self.state.global_step + 1} has come")
            yield batch

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.watchdog.beat(f"a micro-batch of step {self.state.global_step + 1} has gone through")
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.watchdog.watching("the start of an evaluation"):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(*args, **kwargs)
        self.watchdog.beat(f"a batch of the evaluation after step {self.state.global_step}")
        return found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.watchdog.beat(f"a save after step {self.state.global_step} begins")
        self._wait_for_the_first()
        super()._save_checkpoint(*args, **kwargs)
        self.watchdog.beat(f"the save after step {self.state.global_step} is written")

    def _wait_for_the_first(self) -> None:
        """A rank that writes nothing leaves the watch to the one that does: it sees that one's file should that hang."""
        self.watchdog.held = not self.args.should_save
