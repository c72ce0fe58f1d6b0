"""The helper for child processes: the tested code, limits that follow the machine, and Ctrl-C where it was ignored."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import seecal
from tests.support import processes
from tests.support.processes import environment, interruptible, limit


@pytest.mark.parametrize("stranger", ["", "other"])
def test_a_child_runs_the_code_under_test(stranger, tmp_path, monkeypatch):
    (tmp_path / "other" / "seecal").mkdir(parents=True)
    (tmp_path / "other" / "seecal" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / stranger))
    code = "import seecal, tests; print(seecal.__file__, tests.__file__, sep='\\n')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=limit())
    assert done.stdout.splitlines() == [seecal.__file__, str(Path(__file__).parent / "__init__.py")], done.stderr


def test_a_slow_machine_gets_more_time(monkeypatch):
    monkeypatch.setattr(processes, "_UNIT_SECONDS", 1e9)
    assert (limit(), limit(3)) == (60, 180)
    monkeypatch.setattr(processes, "_UNIT_SECONDS", 1e-6)
    assert limit() > 6000


def test_a_child_can_be_interrupted_where_the_tests_cannot(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
        command = [sys.executable, "-c", code]
        start = lambda: subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=limit())  # noqa: E731
        assert start().stdout == "False\n"
        with interruptible():
            assert start().stdout == "True\n"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
