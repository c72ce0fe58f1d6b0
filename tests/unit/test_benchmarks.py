"""Every benchmark runs at its smallest size. What it counts is checked, its times never."""

import csv
import os
import subprocess
import sys

import pytest

from seecal import bench


def run(name, tmp_path, *arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "seecal", "bench", name, "--rounds", "1", "--out", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_benchmark_is_smoke_run_here():
    assert bench.names() == ["loader", "loss", "step"]


def test_loss_holds_a_chunk_and_not_all_rows(tmp_path):
    rows = run("loss", tmp_path)
    peak = {(row["variant"], int(row["rows"]), int(row["vocabulary"])): float(row["peak_mib"]) for row in rows}
    # four times the rows: four times the memory for the naive lines, about the same for the op
    assert peak["naive", 1024, 16384] > 3 * peak["naive", 256, 16384]
    assert peak["seecal", 1024, 16384] < 1.2 * peak["seecal", 256, 16384]
    assert {"device", "torch", "transformers", "seecal", "p20_ms", "p50_ms", "p80_ms"} <= set(rows[0])


def test_step_counts_decoder_tokens_and_peak_memory(tmp_path):
    rows = {row["variant"]: row for row in run("step", tmp_path)}
    assert int(rows["released"]["contrast_tokens"]) == int(rows["released"]["main_tokens"])
    assert int(rows["seecal"]["contrast_tokens"]) < 0.5 * int(rows["seecal"]["main_tokens"])
    assert float(rows["seecal"]["peak_mib"]) < float(rows["hf"]["peak_mib"]) < float(rows["released"]["peak_mib"])


def test_loader_counts_images_and_compares_pixels(tmp_path):
    rows = {(row["files"], row["variant"]): row for row in run("loader", tmp_path, "--workers", "1")}
    assert len(rows) == 8
    assert {row["images"] for row in rows.values()} == {"8"}
    for size in ("96x64", "320x240"):
        assert rows[size, "exact"]["pixel_equal"] == rows[size, "trl images"]["pixel_equal"] == "True"
        assert float(rows[size, "exact"]["max_levels"]) == 0
        assert float(rows[size, "reduced"]["mean_levels"]) < 3
    assert rows["320x240", "reduced"]["pixel_equal"] == "False"
    assert {"cpu", "cores", "workers", "pillow", "times_trl", "images_per_cpu_s"} <= set(rows["96x64", "trl"])


def test_a_benchmark_that_is_none_is_named():
    with pytest.raises(ValueError, match="loader, loss, step"):
        bench.run("speed", [])
