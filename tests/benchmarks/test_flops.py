"""The floors, against arithmetic done by hand, and the counts they rest on, against what the forward really computes."""

import pytest
import torch

from seecal.cli import bench


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(bench.FOLDER))


def small(**changes):
    """Numbers small enough to multiply by hand: 2 layers, D = 4, I = 6, V = 10; 4 patches of 2 × 2 pixels."""
    import shapes

    tower = shapes.Vision(hidden=2, inter=3, layers=1, heads=1, image=4, patch=2)
    numbers = {"layers": 2, "hidden": 4, "inter": 6, "heads": 1, "vocab": 10, "tiles": 1, "batch": 2, "text": (3, 6)}
    return shapes.Shape(**{**numbers, "vision": tower, **changes})


def test_one_forward_of_the_decoder():
    import flops

    # a layer has 4·16 + 3·24 = 136 parameters; two layers, 2 operations each, 3 + 1 = 4 tokens: 2 · 272 · 4
    # pairs of a row of 3: 6, of a row of 1: 1; 4 · 4 operations a pair, two layers: 7 · 16 · 2
    assert flops.decoder(small(), [3, 1]) == (2176, 224)
    assert flops.decoder(small(), []) == (0, 0)
    # the same rows behind 2 tokens and none: 3 · 2 pairs more
    assert flops.decoder(small(), [3, 1], [2, 0]) == (2176, 416)


def test_fewer_heads_of_keys_than_of_queries():
    import flops

    # one of two heads: keys and values are 2 wide, 2·4·(4 + 2) + 3·24 = 120 parameters; attention is as before
    assert flops.decoder(small(heads=2, kv_heads=1), [3, 1]) == (2 * 2 * 120 * 4, 224)
    assert flops.decoder(small(heads=2, kv_heads=2), [3, 1]) == flops.decoder(small(heads=2), [3, 1]) == (2176, 224)


def test_vision_projector_and_head():
    import flops

    shape = small()
    # 4 patches and the class token: 2 · (4·4 + 2·6) · 5 = 280, attention 4 · 2 · 25 = 200, patches 2 · 3 · 4 · 2 · 4 = 192
    assert flops.vision(shape.vision, 1) == 672
    assert flops.vision(shape.vision, 3) == 3 * 672
    # 2 samples of 4 tokens: 2 · 8 · (2 · 2 · 4 + 3 · 16)
    assert flops.projector(shape) == 1024
    assert flops.head(shape, 3) == 2 * 4 * 10 * 3


def test_a_step_by_hand():
    import flops

    image = 2 * 672 + 1024
    # four forwards' worth of the decoder, three of the head, one of the contrast pass
    assert flops.step(small(), [3, 1], 2) == 4 * (2176 + 224) + 3 * 160 + image
    contrast = flops.step(small(), [3, 1], 2, [2]) - flops.step(small(), [3, 1], 2)
    assert contrast == 2 * 272 * 2 + 3 * 16 * 2
    # frozen parameters: one product less in each, attention as before
    assert flops.step(small(projector_only=True), [3, 1], 2) == 3 * 2176 + 4 * 224 + 2 * 160 + image


def test_the_floor_is_the_contrast_pass_over_the_plain_step():
    import flops

    shape = small()
    work = flops.Work(rows=[3, 1], text=[2], before=[0], labels=2)
    found = flops.floors(shape, work)
    plain = 4 * 2400 + 480 + 2368
    assert found["mle"] == plain
    assert found["cal"] - found["mle"] == 1088 + 96
    # one of the two tokens before the image: one is computed, with 1 + 1 pairs
    half = flops.floors(shape, flops.Work(rows=[3, 1], text=[2], before=[1], labels=2))
    assert half["cal"] - half["mle"] == 544 + 64
    # padded to [3, 3]: 4 · (2 · 272 · 6 + 12 · 16 · 2) of the decoder, and the head at 6 tokens
    assert found["hf"] == 4 * (3264 + 384) + 3 * 480 + 2368
    # the published way: the padded forward again, with the head
    assert found["released"] - found["hf"] == 3264 + 384 + 480
    assert found["cal-fp8"] - found["mle"] == (1088 + 96) / 2


def test_the_ladder_ends_at_ours():
    import flops
    import shapes

    for shape in shapes.SHAPES.values():
        found, rungs = flops.floors(shape), list(flops.ladder(shape).values())
        assert rungs[0] == pytest.approx(found["released"] / found["hf"])
        assert rungs[-1] == pytest.approx(found["cal"] / found["hf"])
        assert rungs == sorted(rungs, reverse=True)


@pytest.mark.parametrize("name", ["cal", "cal-padded"])
def test_the_counts_are_those_of_the_forward(name):
    import flops
    import shapes
    import variants

    shape, where = shapes.SHAPES["tiny"], torch.device("cpu")
    model, batch = shapes.build(shape, where, torch.float32), shapes.batch_of(shape, where, torch.float32)
    work = flops.work_of(shapes.draw(shape)[0])
    main, contrast = variants.make(name, model, batch).tokens(batch)
    # what stands before the image is computed again where the attention cannot recall it
    assert contrast in ((sum(work.after), sum(work.text)) if name == "cal" else (sum(work.padded_text),))
    assert main in ((sum(work.rows), sum(work.padded)) if name == "cal" else (sum(work.padded),))
    assert work.labels == int((batch["labels"][:, 1:] != -100).sum())
    assert sum(work.rows) == int(batch["attention_mask"].sum())
