"""Ranks of one machine: one reads the data and writes its Arrow file, the others map that file."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.support.paths import ROOT
from tests.support.processes import environment, limit

RANK = """
import json, os, sys, time
from pathlib import Path
from seecal.data.sources import load

read, made = [], load._made
load._made = lambda row, name, *rest: (read.append(name), made(row, name, *rest))[1]
here, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")

def meet(name, ranks=2):
    (here / f"{name}-{rank}").touch()
    while sum((here / f"{name}-{one}").exists() for one in range(ranks)) < ranks:
        time.sleep(0.01)

def records(data, **options):
    report = load.LoadReport()
    try:
        found = load.load_records(data, report=report, **options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    file = found.cache_files[0]["filename"]
    ids = list(found["id"])
    return {"file": os.stat(file).st_ino, "path": file, "ids": ids, "report": [report.accepted, report.reasons]}

"""


def jsonl(path, count, bad=()):
    rows = [
        {"id": f"r{n}", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a {n}"}]}
        for n in range(count)
    ]
    for number in bad:
        rows[number]["messages"] = "none"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def begin(folder, body, rank=0, **changes):
    script = folder / "rank.py"
    script.write_text(RANK + textwrap.dedent(body))
    (folder / "tmp").mkdir(exist_ok=True)
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env = environment(**{**told, "TMPDIR": str(folder / "tmp"), **changes})
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )


def comes(path, child):
    end = time.monotonic() + limit()
    while not path.exists():
        assert child.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def told(child):
    out, _ = child.communicate(timeout=limit())
    assert child.returncode == 0
    return json.loads(out)


def test_one_rank_reads_and_both_have_the_same(tmp_path):
    """Bad records, several sources, one of them twice, and an error, which both ranks raise."""
    jsonl(tmp_path / "a.jsonl", 40, bad=(3, 17))
    jsonl(tmp_path / "b.jsonl", 30)
    body = """
    meet("begin")
    found = [records(here / "a.jsonl", on_bad="skip"), records(here / "b.jsonl"), records(here / "b.jsonl"),
             records(here / "a.jsonl")]
    meet("end")
    print(json.dumps({"found": found, "read": len(read)}))
    """
    one, two = [told(child) for child in [begin(tmp_path, body, rank) for rank in range(2)]]
    for mine, other in zip(one["found"][:3], two["found"][:3], strict=True):
        assert mine["file"] == other["file"]
        assert mine["path"] != other["path"]
        assert mine["ids"] == other["ids"]
        assert mine["report"] == other["report"]
    skipped = one["found"][0]
    assert len(skipped["ids"]) == skipped["report"][0] == 38
    assert [name for name, _ in skipped["report"][1]] == [
        "a.jsonl: record 'r3' (line 4)",
        "a.jsonl: record 'r17' (line 18)",
    ]
    assert one["found"][1]["file"] != one["found"][2]["file"], "asked for twice it is read twice, as by one process"
    assert one["found"][3] == two["found"][3]
    assert "record 'r3'" in one["found"][3]["error"]
    # both come to the fourth record of the one that is refused; the rest is read by either
    assert one["read"] + two["read"] == 40 + 30 + 30 + 2 * 4
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_rank_that_dies_while_it_writes_keeps_nobody(tmp_path):
    jsonl(tmp_path / "a.jsonl", 40)
    dies = """
    def slow(*arguments):
        (here / "writing").touch()
        time.sleep(600)
    load._made = slow
    records(here / "a.jsonl")
    """
    first = begin(tmp_path, dies)
    waits = """
    (here / "asking").touch()
    print(json.dumps({"found": records(here / "a.jsonl"), "read": len(read)}))
    """
    comes(tmp_path / "writing", first)
    second = begin(tmp_path, waits, rank=1)
    comes(tmp_path / "asking", second)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert told(second)["read"] == 40


@pytest.mark.parametrize(
    "apart", ["another launch", "another file since", "the writer is gone", "a folder that all can write"]
)
def test_nothing_is_taken_from_strangers(tmp_path, apart):
    """Each of these reads by itself."""
    data = jsonl(tmp_path / "a.jsonl", 40)
    stays = """
    found = records(here / "a.jsonl")
    (here / "first").touch()
    while not (here / "second").exists():
        time.sleep(0.02)
    print(json.dumps({"found": found, "read": len(read)}))
    """
    reads = """
    found = records(here / "a.jsonl")
    (here / "second").touch()
    print(json.dumps({"found": found, "read": len(read)}))
    """
    first = begin(tmp_path, stays)
    comes(tmp_path / "first", first)
    changes = {}
    if apart == "another launch":
        changes = {"MASTER_PORT": "12345"}
    elif apart == "another file since":
        jsonl(data, 41)
    elif apart == "the writer is gone":
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    else:
        next((tmp_path / "tmp").glob("seecal-launch-*")).chmod(0o777)
    second = told(begin(tmp_path, reads, rank=1, **changes))
    assert second["read"] == len(second["found"]["ids"]) == (41 if apart == "another file since" else 40)
    if apart != "the writer is gone":
        assert told(first)["found"]["file"] != second["found"]["file"]
