"""No command opens a socket of the internet, whatever the environment says: no_network.py watches over children."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.processes import environment, limit

WATCH = ROOT / "tests" / "support" / "no_network.py"
TRAIN = ["train", "--config", "tiny", "--stages.1.max_steps", "2", "--stages.2.max_steps", "2", "--save_steps", "1"]
MODEL = ["--model", "out/tiny/run/final"]
# In order: each goes on with what the one before it left. A command that reads data or a model belongs here.
COMMANDS = [
    ["tiny-folder"],
    ["check-data", "tiny", "--workers", "1"],
    ["preview", "tiny", "-n", "2", "--model", "out/tiny/model", "--html", "out/preview.html"],
    [*TRAIN, "--dataloader_num_workers", "1"],
    [*TRAIN, "--dataloader_num_workers", "1", "--resume"],
    ["score", *MODEL, "--data", "out/tiny/data.json", "--out", "out/scores"],
    ["filter", "out/scores", "--top", "0.5", "--out", "out/kept.json"],
    ["calibrate", "--scores", "out/scores"],
    ["report", "out/scores", "--out", "out/report.html"],
    ["report", "--alignment", *MODEL, "--data", "out/tiny/data.json", "--ids", "r0", "--out", "out/alignment.html"],
    ["chat", MODEL[1], "out/tiny/images/data-r0-0.png", "What is it?", "--max-new-tokens", "2"],
    ["families"],
    ["train", "--config", "tiny", "--dry-run"],
    ["train", "--config", "gemma3-qlora", "--dry-run"],
]


def watched(folder, *command):
    """(the process, what was written down); none of the variables that forbid the Hub is set."""
    (folder / "watch").mkdir(exist_ok=True)
    shutil.copy(WATCH, folder / "watch" / "sitecustomize.py")
    said = folder / "sockets.txt"
    said.write_text("")
    variables = environment(folder / "watch", SOCKETS=str(said), HF_HOME=str(folder / "cache"))
    for name in [name for name in variables if name.endswith("_OFFLINE") or name.startswith("HF_HUB_DISABLE")]:
        del variables[name]
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=variables, text=True, capture_output=True, timeout=limit(3)
    )
    return done, said.read_text().splitlines()


# All in one process, which is started once
ALL = """
import json, sys
from seecal.cli.main import main
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{command} ended with {end.code}")
    print("command ended:", command[0])
"""


def test_no_command_opens_a_socket(tmp_path):
    done, said = watched(tmp_path, "-c", ALL, json.dumps(COMMANDS))
    assert [line for line in said if line != "filter"] == []
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    ended = [
        line.removeprefix("command ended: ") for line in done.stdout.splitlines() if line.startswith("command ended: ")
    ]
    assert ended == [command[0] for command in COMMANDS]


@pytest.mark.parametrize("code", [
    "import socket; socket.socket(socket.AF_INET)",
    "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    "import socket; socket.getaddrinfo('localhost', 80)",
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
    "import huggingface_hub; huggingface_hub.model_info('a/b')",
])  # fmt: skip
def test_a_socket_is_seen(tmp_path, code):
    done, said = watched(tmp_path, "-c", code)
    assert (done.returncode, said[-1] != "filter") == (97, True), done.stderr


@pytest.mark.parametrize("family", [2, 10])
def test_a_socket_of_c_code_is_seen(tmp_path, family):
    done, said = watched(tmp_path, "-c", f"import ctypes; ctypes.CDLL(None).socket({family}, 1, 0)")
    if "filter" not in said:
        pytest.skip("no seccomp here: sockets of C code are not seen")
    assert done.returncode == -signal.SIGSYS


def test_sockets_between_processes_are_not_of_the_internet(tmp_path):
    code = "import socket, torch; torch.zeros(1); a, b = socket.socketpair(); a.send(b'1'); b.recv(1)"
    done, said = watched(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert [line for line in said if line != "filter"] == []
