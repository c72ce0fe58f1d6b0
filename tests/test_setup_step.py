"""The Makefile's set-up: a line a step, a line while a step lasts, and the command's own exit code."""

import re
import subprocess
import sys

from scripts import setup_step

from tests.support.paths import ROOT
from tests.support.processes import environment, limit


def test_a_long_step_speaks_while_it_lasts(monkeypatch, capfd):
    monkeypatch.setattr(setup_step, "SECONDS_BETWEEN_LINES", 0.05)
    assert setup_step.main("set-up 2 of 4: torch", [sys.executable, "-c", "import time; time.sleep(0.5)"]) == 0
    first, *more = capfd.readouterr().out.splitlines()
    assert first == "set-up 2 of 4: torch"
    assert len(more) > 2
    assert all(line == "set-up 2 of 4: torch: 0:00 so far" for line in more[:2])


def test_the_commands_exit_code_is_its_own():
    command = [
        sys.executable,
        str(ROOT / "scripts" / "setup_step.py"),
        "a step",
        sys.executable,
        "-c",
        "raise SystemExit(7)",
    ]
    done = subprocess.run(command, env=environment(), timeout=limit(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "a step\n")


def test_every_installing_line_of_the_makefile_goes_through_it():
    text = (ROOT / "Makefile").read_text("utf8")
    lines = [line for line in text.splitlines() if re.search(r"\$\(PIP\)|-m venv", line) and line.startswith("\t")]
    lines = [line for line in lines if "build/audit" not in line]  # small, and not part of the set-up
    assert len([line for line in lines if "$(OLDEST)" not in line]) == 4
    assert all("$(STEP)" in line for line in lines)
