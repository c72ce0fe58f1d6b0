"""The README: its Python runs, its commands exist or are run here, its links lead somewhere, its figures are measured."""

import csv
import re
import shlex
import subprocess
import sys

import pytest

from seecal.cli import bench
from seecal.cli import main as cli
from seecal.families.table import FAMILIES
from tests.support.paths import ROOT
from tests.support.processes import environment, limit
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

TEXT = (ROOT / "README.md").read_text("utf8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in FENCES if language == "python"]
SHELL = [line.split("#")[0].strip() for language, code in FENCES if not language for line in code.splitlines()]


def test_both_first_commands_stand_on_the_first_screen():
    first = "\n".join(TEXT.splitlines()[:25])
    assert "\nmake demo " in first
    assert "\nmake test " in first
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "check", "bench"} <= set(targets)


def test_the_demos_output_is_there():
    for words in ("after stage 1", "after stage 2", "Held out:", "True description of", "Next:"):
        assert words in TEXT


def test_the_trl_block_runs(tmp_path):
    from seecal import CALConfig

    model, processor = tiny_llava(), tiny_llava_processor()
    code = PYTHON[0].replace('model="llava-hf/llava-1.5-7b-hf"', "model=model, processing_class=processor")
    config = CALConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True
    )
    code = code.replace('CALConfig(output_dir="out")', "config")
    assert "model=model" in code
    names = {"model": model, "processor": processor, "dataset": tiny_dataset(4), "config": config}
    exec(code, names)
    assert names["trainer"].state.global_step == 1


def test_the_other_two_blocks_run():
    from seecal.data.collators.vision import VisionCollator

    model = tiny_llava().train()
    batch = dict(VisionCollator(tiny_llava_processor())(list(tiny_dataset(3))))
    names = {"model": model, "batch": batch}
    for code in PYTHON[1:]:
        exec(code, names)
    assert names["weights"].shape == names["delta"].delta.shape
    assert names["loss"].requires_grad


def test_every_seecal_command_exists():
    known = {command.name or command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands}
    used = {shlex.split(line)[1] for line in SHELL if line.startswith("seecal ")}
    assert used <= known
    assert {"demo", "train", "chat", "families", "bench"} <= used
    assert "step" in bench.names()


@pytest.mark.parametrize("line", ["seecal tiny-folder", "seecal train --config tiny"], ids=str)
def test_the_train_line_is_the_one_of_the_recipes_page(line):
    assert line in TEXT
    assert line in (ROOT / "docs" / "recipes.md").read_text("utf8"), "tests/docs/test_recipes.py runs those"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target


def test_the_number_of_families_is_true():
    assert f"{len(FAMILIES)} model families" in " ".join(TEXT.split())


def test_the_table_of_costs_is_what_the_benchmark_counts(tmp_path):
    command = [sys.executable, "-m", "seecal", "bench", "step", "--variants", "hf,released,cal"]
    command += ["--rounds", "1", "--out", str(tmp_path)]
    on_cpu = environment(CUDA_VISIBLE_DEVICES="")
    subprocess.run(command, check=True, capture_output=True, env=on_cpu, timeout=limit(2))
    with (tmp_path / "step-tiny.csv").open(encoding="utf-8") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    for begin, variant in {"| transformers": "hf", "| CAL as published": "released", "| seecal |": "cal"}.items():
        (line,) = (line for line in TEXT.splitlines() if line.startswith(begin))
        _, _, tokens, peak, _ = line.split("|")
        found = rows[variant]
        assert tokens.strip() == f"{found['main_tokens']} + {found['contrast_tokens']}"
        claimed = float(peak.split()[0])
        assert abs(claimed - float(found["peak_mib"])) < 0.05 * claimed
