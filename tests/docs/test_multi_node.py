"""docs/multi-node.md: its tables are those of the formulas, its commands are those of accelerate, its Slurm scripts run."""

import dataclasses
import os
import re
import signal
import subprocess
import time

import pytest
from scripts import multi_node_page as page

from seecal.planning.memory import Counts, Precision, held
from tests.support.processes import environment, limit

TEXT = page.PAGE.read_text("utf8")
SCRIPTS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("name", page.TABLES)
def test_the_tables_are_those_of_the_formulas(name):
    assert page.with_table(TEXT, name, page.TABLES[name]()) == TEXT, "python -m scripts.multi_node_page"


def test_what_the_text_says_of_each_engine():
    """The formulas of the page, written once more, for numbers that make each term visible."""
    found = Counts(all=11 * 10**9, trained=10 * 10**9, layer=10**8, outside=10**9)
    projector = dataclasses.replace(found, trained=10**8)

    def gigabytes(engine, counts=found, width=4):
        return held(engine, counts, 8, Precision(width)).total / 1e9

    assert gigabytes("ddp") == 22 * 10 + 4
    assert gigabytes("ddp", width=2) == 10 * 10 + 2
    assert gigabytes("ddp", projector) == pytest.approx(22 * 0.1 + 4 * 10.9)
    assert gigabytes("fsdp2") == pytest.approx((16 * 10 + 4) / 8 + 2 * 1.2 + 2 * 1.1)
    assert gigabytes("zero2") == pytest.approx(2 * 11 + 18 * 10 / 8 + 2)
    assert gigabytes("zero3") == pytest.approx((20 * 10 + 2) / 8 + 2 + 2)


def test_the_7b_is_as_large_as_the_released_one():
    assert page.counts("LLaVA-1.5 7B").all == 7_063_427_072  # llava-hf/llava-1.5-7b-hf


def test_the_options_are_those_of_accelerate():
    from accelerate.commands.launch import launch_command_parser

    known = launch_command_parser()._option_string_actions
    used = set(re.findall(r"--\w+", TEXT.split("### Slurm")[0].split("```text")[1].split("-m seecal")[0]))
    assert len(used) == 6
    assert used <= set(known)


def job(folder, fake_accelerate):
    """The page's Slurm script, running, with a machine's srun, scontrol and pkill made of a few lines each."""
    commands = {
        "seecal": "echo fsdp2.yaml",
        "scontrol": 'case $1 in show) printf "one\\ntwo\\n" ;; *) echo "$*" >> requeued ;; esac',
        "srun": 'shift; export SLURM_NODEID=1; exec "$@"',
        "pkill": 'echo "$3" > pattern; kill -USR1 "$(cat rank)"',
        "accelerate": f'echo "$*" > launched; echo $$ > rank; touch started\n{fake_accelerate}',
    }
    for name, lines in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(folder / "run"), "RECIPE": "tiny"}
    variables |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "one,two"}
    return subprocess.Popen(["bash", "-c", SCRIPTS[0]], cwd=folder, env=environment(**variables))


def test_slurm_time_is_over_and_the_job_goes_on(tmp_path):
    saves = "trap 'mkdir -p $OUT/stage-1/checkpoint-5; exit 1' USR1\nwhile :; do sleep 0.05; done"
    running = job(tmp_path, saves)
    until = time.monotonic() + limit()
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)  # its trap
    running.send_signal(signal.SIGUSR1)
    assert running.wait(limit()) != 0
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    launched = (tmp_path / "launched").read_text()
    for part in (
        "--config_file fsdp2.yaml",
        "--num_processes 32 --machine_rank 1",
        "--main_process_ip one",
        "--resume",
    ):
        assert part in launched
    pattern = (tmp_path / "pattern").read_text().strip()
    assert re.search(pattern, "/usr/bin/python3.11 -u -m seecal train --config tiny")
    assert re.search(pattern, "python -m seecal train --config tiny")
    assert not re.search(pattern, f"/usr/bin/python /usr/bin/accelerate {launched}")


@pytest.mark.parametrize(("ends", "code", "again"), [
    ("exit 1", 1, False),
    ("exit 0", 0, False),
    ("mkdir -p $OUT/stage-1/checkpoint-5; exit 0", 0, False),
    ("mkdir -p $OUT/stage-1/checkpoint-5; exit 1", 1, True),
])  # fmt: skip
def test_only_what_got_further_is_started_again(tmp_path, ends, code, again):
    assert job(tmp_path, ends).wait(limit()) == code
    assert (tmp_path / "requeued").exists() is again


@pytest.mark.parametrize(("code", "again"), [(138, True), (143, True), (75, True), (1, False), (2, False), (0, False)])
def test_codes_without_a_launcher(tmp_path, code, again):
    for name, line in {"srun": f"exit {code}", "scontrol": 'echo "$*" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    variables = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7")
    done = subprocess.run(["bash", "-c", SCRIPTS[1]], cwd=tmp_path, env=variables, timeout=limit(), check=False)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() is again
