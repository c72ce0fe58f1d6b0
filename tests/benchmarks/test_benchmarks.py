"""Every benchmark runs at its smallest size, through the one command. What they count is checked, their times never."""

import csv
import subprocess
import sys

import pytest
import torch

from seecal.cli import bench
from tests.support.chromium import chromium_path
from tests.support.processes import environment, limit

# One run serves many tests; keep them on one worker.
ENVIRONMENT = environment(CUDA_VISIBLE_DEVICES="")


def seecal_bench(*arguments):
    command = [sys.executable, "-m", "seecal", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit(8), env=ENVIRONMENT)


def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What ``seecal bench gpu --tiny`` leaves."""
    folder = tmp_path_factory.mktemp("results")
    done = seecal_bench("gpu", "--tiny", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def modules(monkeypatch):
    """The scripts as modules, by their names."""
    monkeypatch.syspath_prepend(str(bench.FOLDER))
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])  # what they start runs the tested code too


def test_every_benchmark_is_smoke_run_here(results):
    assert bench.names() == [
        "check",
        "evidence",
        "flops",
        "gpu",
        "loader",
        "loss",
        "plot",
        "records_index",
        "report_page",
        "scaling",
        "step",
        "trainer",
        "weights",
    ]
    assert [(row["part"], row["outcome"]) for row in rows(results / "parts.csv")] == [
        (name, "done") for name in ("check", "step-tiny", "step-tiny-projector", "options", "loss", "scaling")
    ]
    for name in ("step", "scaling", "loss"):
        assert "</svg>" in (results / f"{name}.svg").read_text("utf8")
    for name in ("check-tiny", "step-tiny", "loss-tiny", "scaling-tiny", "options-tiny"):
        assert {"device", "torch", "transformers", "seecal"} <= set(rows(results / f"{name}.csv")[0])


def test_without_figures_every_target_waits(results):
    found = rows(results / "summary.csv")
    assert len(found) == 16
    assert {row["verdict"] for row in found} == {"waits for a GPU"}


def test_the_check_compared_every_route_in_both_precisions(results):
    found = [row for row in rows(results / "check-tiny.csv") if row["allowed"]]
    assert {row["ok"] for row in found} == {"yes"}
    quantities = {"delta", "loss", *(f"gradient of the {part}" for part in ("decoder", "head", "projector"))}
    assert {row["quantity"] for row in found} == quantities
    assert len(found) == 4 * 2 * len(quantities)


def test_the_check_finds_a_route_that_is_off(modules, monkeypatch):
    import check

    monkeypatch.setattr(check, "ROUTES", {"another window": {"window": 1}, "alpha": {"alpha": 0.5}})
    monkeypatch.setattr(check, "REPORTED", {"approximation": {"beta": 0.5}})
    found = check.compare(check.SIZES["tiny"], torch.device("cpu"))
    wrong = {(row["route"], row["dtype"], row["quantity"]) for row in found if row["ok"] == "NO"}
    for route in ("another window", "alpha"):
        assert {(route, "float32", "loss"), (route, "bfloat16", "gradient of the head")} <= wrong
    assert not any(quantity == "delta" for _, _, quantity in wrong)
    reported = {row["quantity"]: row for row in found if row["route"] == "approximation"}
    assert float(reported["loss"]["error"]) > check.EXACT
    assert {row["ok"] for row in reported.values()} == {""}


def test_step_counts_decoder_slots_and_peak_memory(results):
    found = {row["variant"]: row for row in rows(results / "step-tiny.csv")}
    assert {"hf", "trl", "released", "mle", "cal", "cal-padded"} <= set(found)
    tokens = {
        name: (int(row["main_tokens"]), int(row["contrast_tokens"])) for name, row in found.items() if row["rounds"]
    }
    assert tokens["hf"] == tokens["trl"] == (488, 0)
    assert tokens["released"] == (488, 488)
    assert tokens["cal"][0] <= tokens["cal-padded"][0] == 488
    assert tokens["cal"][1] < tokens["cal-padded"][1] < 488 / 2
    assert tokens["mle"][1] <= tokens["cal"][1]
    peak = {name: float(row["peak_mib"]) for name, row in found.items() if row["rounds"]}
    assert peak["cal"] < 0.5 * peak["hf"] < peak["hf"] < peak["released"]


def test_where_only_the_projector_trains_less_is_held(results):
    both = [{row["variant"]: row for row in rows(results / f"step-{name}.csv")} for name in ("tiny", "tiny-projector")]
    whole, projector = (float(found["cal"]["peak_mib"]) for found in both)
    assert projector < 0.8 * whole


def test_loss_holds_a_chunk_and_not_all_rows(results):
    found = {(row["variant"], int(row["rows"])): row for row in rows(results / "loss-tiny.csv")}
    beyond = {key: float(row["mib_per_row"]) for key, row in found.items() if row["mib_per_row"]}
    # four times the rows: the naive lines hold as much a row as before, chunks of 128 much less
    assert beyond["naive", 256] > beyond["naive", 64]
    assert beyond["ours-128", 256] < 0.6 * beyond["ours-128", 64]
    assert beyond["ours-128", 256] < 0.5 * beyond["naive", 256]


def test_the_losses_are_the_same_number(modules):
    import loss

    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16), torch.randn(64, 16)
    labels, token_weights = torch.randint(64, (40,)), torch.rand(40) + 1
    found = [loss.LOSSES[name](hidden, weight, labels, token_weights) for name in ("naive", "ours", "ours-128", "trl")]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], atol=1e-5, rtol=0)


def test_scaling_moves_one_thing_at_a_time(results):
    found = rows(results / "scaling-tiny.csv")
    tokens = {(row["axis"], int(row["value"])): row for row in found if row["variant"] == "cal"}
    assert len(tokens) == 8
    counted = {key: (int(row["main_tokens"]), int(row["contrast_tokens"])) for key, row in tokens.items()}
    assert counted["image", 192][1] == counted["image", 64][1]
    assert counted["image", 192][0] == counted["image", 64][0] + 4 * 128
    assert counted["vocabulary", 8192] == counted["vocabulary", 4096]
    assert counted["text", 120][1] > 2 * counted["text", 39][1]
    floor = {key: float(row["floor_of_mle"]) for key, row in tokens.items()}
    assert floor["text", 120] > floor["text", 39] > floor["image", 192] > 1


def test_low_precision_keeps_the_frequencies_of_the_positions(modules):
    """Rounded to bfloat16 they triple the error of Δ in a row of some hundred tokens."""
    import shapes

    model = shapes.build(shapes.SHAPES["tiny"], torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_plain_steps_are_the_same_loss(modules, monkeypatch):
    import shapes
    import variants

    stand_in_for_liger(monkeypatch)
    shape, where = shapes.SHAPES["tiny"], torch.device("cpu")
    model, batch = shapes.build(shape, where, torch.float32), shapes.batch_of(shape, where, torch.float32)
    found = {name: variants.make(name, model, batch).loss().detach() for name in ("hf", "trl", "liger", "mle")}
    assert float(found["hf"]) > 1
    for name, loss in found.items():
        torch.testing.assert_close(loss, found["hf"], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    with_cal = variants.make("cal", model, batch).loss().detach()
    padded = variants.make("cal-padded", model, batch).loss().detach()
    torch.testing.assert_close(with_cal, padded, atol=1e-5, rtol=0)


def stand_in_for_liger(monkeypatch):
    """Liger needs a GPU; its loss takes (weight, hidden, labels), and that is what is called here."""
    import types

    class Loss:
        def __call__(self, weight, hidden, labels):
            return torch.nn.functional.cross_entropy(hidden @ weight.T, labels)

    package = types.ModuleType("liger_kernel")
    package.transformers = types.ModuleType("liger_kernel.transformers")
    package.transformers.LigerFusedLinearCrossEntropyLoss = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)


def test_what_is_not_installed_is_left_out_and_says_so(modules, monkeypatch):
    import shapes
    import step

    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    found = {row["variant"]: row for row in step.measure(shapes.SHAPES["tiny"], ["hf", "trl", "cal"], 1, None)[0]}
    assert found["trl"]["note"] == "this trl has no trl.trainer.utils.add_fused_lm_head"
    assert found["trl"]["p50_ms"] == ""
    assert float(found["cal"]["of_hf"]) > 0
    assert not found["cal"]["note"]


def test_the_published_way_is_ours_with_its_pooling(modules):
    """released is written by hand; ours has it as an option."""
    import shapes
    import variants

    import seecal

    shape, where = shapes.SHAPES["tiny"], torch.device("cpu")
    model, batch = shapes.build(shape, where, torch.float32), shapes.batch_of(shape, where, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # Δ of a few logits, below, inside and above [1, 5]
    by_hand = variants.released(model, batch).detach()
    options = seecal.CALOptions(contrast="mask", pool_scope="released", normalize="micro_batch")
    output = seecal.enable_cal(model, options)(**batch)
    assert 0.1 < float((output.cal.weights > 1).float().mean()) < 1
    torch.testing.assert_close(output.loss.detach(), by_hand, atol=0, rtol=1e-5)


def test_what_cannot_run_leaves_the_others_their_figures(modules):
    import common

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken():
        raise RuntimeError("no kernel\nfor this")

    cleared = []
    able, notes = common.runnable({"a": lambda: None, "b": out_of_memory, "c": broken}, lambda: cleared.append(1))
    assert list(able) == ["a"]
    assert notes == {"b": "out of memory", "c": "failed: RuntimeError: no kernel"}
    assert len(cleared) == 2
    times = common.interleaved(able, rounds=9, warmup=1, seconds=0)
    assert times["a"]["rounds"] == 3


def test_no_variant_always_follows_the_same_one(modules):
    """Plain training came out slower than CAL, which does more: it always ran after what had given back gigabytes."""
    import common

    ran: list[str] = []
    names = ("hf", "trl", "released", "mle", "cal")
    common.round_times({name: lambda name=name: ran.append(name) for name in names}, rounds=5, warmup=1)
    rounds = [ran[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(one) == sorted(names) for one in rounds)
    assert rounds == [common.shuffled(names, turn) for turn in range(6)]
    for name in names:
        before = {ran[place - 1] for place in range(1, 30) if ran[place] == name}
        assert len(before) > 2, f"{name} only ever ran after {before}"


def test_a_part_that_fails_or_takes_too_long_is_a_row(modules, tmp_path):
    import gpu

    (tmp_path / "logs").mkdir()
    wrong = gpu.Part("wrong", ["step", "--shape", "none"], 60)
    slow = gpu.Part("slow", ["step"], 60)
    gpu.run(wrong, tmp_path, left=limit())
    gpu.run(slow, tmp_path, left=0.1)
    gpu.note_parts([wrong, slow, gpu.Part("never", ["step"], 60)], tmp_path)
    found = {row["part"]: row for row in rows(tmp_path / "parts.csv")}
    assert found["wrong"]["outcome"] == "failed with exit code 2"
    assert "invalid choice: 'none'" in found["wrong"]["note"]
    assert found["slow"]["outcome"] == "cut off: time was up"
    assert found["never"]["outcome"] == "not begun: time was up"


def test_every_part_of_the_real_run_is_a_command_that_parses(modules):
    """The shapes, sizes and variants it names exist: no GPU is needed to know that."""
    import gpu
    import loss
    import scaling
    import shapes
    import targets
    import variants

    parts = gpu.parts(tiny=False, rounds=5)
    assert parts[0].name == "check"
    assert [part.arguments[2] for part in parts if part.name.startswith("step-")] == list(shapes.GPU_SHAPES)
    assert list(targets.OF_HF) == list(targets.MEMORY) == list(shapes.GPU_SHAPES)
    assert {part.arguments[0] for part in parts} <= set(bench.names())
    assert set(gpu.EXTRA.split(",")) <= set(variants.NAMES)
    assert "gpu" in loss.SIZES
    assert "gpu" in scaling.BASES
    assert sum(part.seconds + 20 for part in parts) <= 9 * 60  # with loading: what --minutes gives by default


def test_without_a_gpu_the_one_command_says_what_to_do(tmp_path):
    done = seecal_bench("gpu", "--out", tmp_path)
    assert done.returncode == 2
    assert "--tiny" in done.stderr


def test_verdicts_read_the_figures(modules, tmp_path):
    import targets

    def put(shape, times, peaks, device="Some GPU"):
        with (tmp_path / f"step-{shape}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["variant", "p50_ms", "floor_of_mle", "held_mib", "peak_mib", "device"])
            writer.writeheader()
            for name, time in times.items():
                row = {"variant": name, "p50_ms": time, "floor_of_mle": 1.05, "device": device}
                writer.writerow({**row, "held_mib": 1024, "peak_mib": peaks.get(name, "")})

    put("llava-1.5-7b", {"hf": 1000, "trl": 980, "mle": 900, "cal": 999}, {"hf": 2048, "cal": 1024})
    put("llava-next-7b", {"hf": 1000, "trl": 980, "mle": 950, "cal": 1001}, {"hf": 1024, "cal": 2048})
    put("3b-152k", {"hf": 1000, "cal": 900}, {"hf": 3072, "cal": 1024}, device="cpu (x86_64)")
    found = {(one.shape, one.target): one for one in targets.verdicts(tmp_path)}
    words = {key: one.word for key, one in found.items()}
    assert words["llava-1.5-7b", "time: ours CAL / hf"] == "met"
    assert found["llava-1.5-7b", "time: ours CAL / hf"].measured == pytest.approx(0.999)
    assert words["llava-1.5-7b", "time: ours CAL / TRL"] == "met"
    assert words["llava-1.5-7b", "time: ours CAL / ours MLE above the floor"] == "missed"
    assert found["llava-1.5-7b", "time: ours CAL / ours MLE above the floor"].measured == pytest.approx(0.06)
    assert words["llava-1.5-7b", "peak memory: ours CAL / hf"] == "met"
    assert found["llava-1.5-7b", "peak memory: ours CAL / hf"].measured == pytest.approx(2 / 3)
    assert words["llava-next-7b", "time: ours CAL / hf"] == "missed"
    assert words["llava-next-7b", "peak memory: ours CAL / hf"] == "missed"
    waiting = {shape for shape, _ in words if words[shape, "time: ours CAL / hf"] == "waits for a GPU"}
    assert waiting == {"3b-152k", "llava-1.5-7b-projector"}  # the first has figures, but of a CPU


def test_an_unknown_variant_is_named():
    done = seecal_bench("step", "--variants", "hf,faster")
    assert done.returncode == 2
    assert "there is no faster" in done.stderr


def test_loader_counts_images_and_compares_pixels(tmp_path):
    done = seecal_bench("loader", "--rounds", 1, "--workers", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    found = {(row["files"], row["variant"]): row for row in rows(path)}
    assert len(found) == 8
    assert {row["images"] for row in found.values()} == {"8"}
    for size in ("96x64", "320x240"):
        assert found[size, "exact"]["pixel_equal"] == found[size, "trl images"]["pixel_equal"] == "True"
        assert float(found[size, "exact"]["max_levels"]) == 0
        assert float(found[size, "reduced"]["mean_levels"]) < 3
    assert found["320x240", "reduced"]["pixel_equal"] == "False"
    assert {"cpu", "cores", "workers", "pillow", "times_trl", "images_per_cpu_s"} <= set(found["96x64", "trl"])


@pytest.mark.real
def test_a_report_page_is_opened_and_used(tmp_path):
    chromium_path()
    done = seecal_bench("report_page", "--samples", 60, "--rounds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "report_page.csv")
    assert [row["what"] for row in found] == ["open", "search", "filter", "sort", "page"] * 2
    assert {row["samples"] for row in found} == {"60"}
    assert all(float(row["ms_p50"]) > 0 for row in found)


def test_weights_are_compared_with_float32(tmp_path):
    done = seecal_bench("weights", "--drawings", 4, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = {row["way"]: row for row in rows(tmp_path / "weights.csv")}
    error = {name: float(row["delta_error_mean"]) for name, row in found.items()}
    assert error["float32"] == 0 < error["bfloat16"] < error["float8"]
    assert 1 <= float(found["float8"]["weight_mean"]) <= 5


def test_a_benchmark_that_is_none_is_named():
    with pytest.raises(ValueError, match="loss, plot, records_index, report_page, scaling, step, trainer, weights"):
        bench.run("speed", [])


def test_records_are_opened_and_collated_under_a_watch_on_memory(tmp_path):
    done = seecal_bench("records_index", "--records", 200, "--steps", 60, "--batch", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = rows(tmp_path / "records_index-tiny.csv")
    assert (row["records"], row["steps"]) == ("200", "60")
    assert 0 < float(row["anonymous_mib"]) < float(row["resident_mib"]) <= float(row["peak_mib"])
    # Without torch and transformers
    assert 0 < float(row["alone_opened_mib"]) <= float(row["alone_peak_mib"]) < float(row["before_mib"])


def test_the_slope_of_memory_is_that_of_a_line(modules):
    from records_index import slope

    assert slope([20, 40, 60], [1.0, 2.0, 3.0]) == pytest.approx(0.05)
    assert slope([20, 40, 60, 80], [7.0, 5.0, 5.0, 7.0]) == pytest.approx(0)
