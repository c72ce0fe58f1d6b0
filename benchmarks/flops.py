"""Floating-point operations of a training step, counted from the shapes alone: the floor under every measured ratio.

    floor(ours CAL / ours MLE) - 1 = contrast pass / MLE step

A matrix product of [n, a] with [a, b] is 2·n·a·b. A decoder layer multiplies each token with 4·D² (query, key, value,
output; where k of h heads have keys and values of their own, 2·(1 + k/h)·D²) + 3·D·I (gate, up, down) parameters; its
causal attention looks at n(n+1)/2 pairs in a row of n tokens, 2·D for the score and 2·D for the value of each. Backward:
twice the forward (gradient of the input and of the parameters), or once where the parameters are frozen; attention has no
parameters and always takes two. Every decoder layer is checkpointed: one forward more. Nothing else is counted (norms,
softmax, copies), and everything is taken to run at the same rate, so a real step is somewhat off; ratios are what this
is for.

D width of the decoder, I of its MLP, V vocabulary, N label tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from common import write
from shapes import IMAGE, SHAPES, Row, Shape, Vision, draw


@dataclass(frozen=True)
class Work:
    """What a batch asks for.

    Attributes:
        rows: tokens of every sample, image included, without padding.
        text: tokens of the pass without the image: text up to the token that predicts the sample's last label.
        before: how many of those stand before the image. Causal: they are what they are in the pass with the image, so
            their keys and values need not be computed again, only looked at.
        labels: N.
    """

    rows: list[int]
    text: list[int]
    before: list[int]
    labels: int

    @property
    def after(self) -> list[int]:
        return [text - before for text, before in zip(self.text, self.before, strict=True)]

    @property
    def padded(self) -> list[int]:
        return [max(self.rows)] * len(self.rows)

    @property
    def padded_text(self) -> list[int]:
        return [max(self.text)] * len(self.text)


def work_of(rows: list[Row]) -> Work:
    """What these samples, all with an image before their labels, ask for."""
    text, before, count = [], [], 0
    for ids, labels in rows:
        columns = (labels[1:] != -100).nonzero()[:, 0] + 1
        count += len(columns)
        text.append(int((ids[: int(columns[-1])] != IMAGE).sum()))
        before.append(int((ids == IMAGE).nonzero()[0]))
    return Work([len(ids) for ids, _ in rows], text, before, count)


def decoder(shape: Shape, rows: list[int], before: list[int] | None = None) -> tuple[int, int]:
    """(products with parameters, attention) of one forward over rows of these many tokens.

    ``before``: tokens of each row whose keys and values are there already.
    """
    keys = shape.hidden * (shape.kv_heads or shape.heads) // shape.heads
    parameters = shape.layers * (2 * shape.hidden * (shape.hidden + keys) + 3 * shape.hidden * shape.inter)
    pairs = sum(n * (n + 1) // 2 + n * there for n, there in zip(rows, before or [0] * len(rows), strict=True))
    return 2 * parameters * sum(rows), 4 * shape.hidden * pairs * shape.layers


def head(shape: Shape, rows: int) -> int:
    """One product with the vocabulary."""
    return 2 * shape.hidden * shape.vocab * rows


def vision(tower: Vision, tiles: int) -> int:
    """One forward of the tower: the patches, then every layer with its two-sided attention over patches and class token."""
    tokens = tower.tokens + 1
    layer = 2 * (4 * tower.hidden**2 + 2 * tower.hidden * tower.inter) * tokens + 4 * tower.hidden * tokens**2
    patches = 2 * 3 * tower.patch**2 * tower.hidden * tower.tokens
    return tiles * (tower.layers * layer + patches)


def projector(shape: Shape) -> int:
    """Both layers, forward and backward; the first needs no gradient of its input, the tower below is frozen."""
    tokens = shape.batch * shape.image_tokens
    return 2 * tokens * (2 * shape.vision.hidden * shape.hidden + 3 * shape.hidden**2)


def step(
    shape: Shape,
    rows: list[int],
    head_rows: int,
    contrast: list[int] | None = None,
    contrast_head: int = 0,
    before: list[int] | None = None,
) -> int:
    """A whole training step: forward, recomputation, backward, and a contrast pass over ``contrast`` rows."""
    linear, attention = decoder(shape, rows)
    frozen = shape.projector_only
    main = linear * (3 if frozen else 4) + attention * 4 + head(shape, head_rows) * (2 if frozen else 3)
    image = vision(shape.vision, shape.batch * shape.tiles) + projector(shape)
    return main + image + sum(decoder(shape, contrast or [], before)) + head(shape, contrast_head)


def floors(shape: Shape, work: Work | None = None) -> dict[str, float]:
    """The operations of every variant of the step benchmark.

    For our own, of what has to be computed: real tokens, label rows, text after the image. For the padded and the
    published ones, of what they compute by design.
    """
    work = work or work_of(draw(shape)[0])
    tokens = sum(work.padded)
    mle = step(shape, work.rows, work.labels)
    contrast = step(shape, work.rows, work.labels, work.after, before=work.before) - mle
    labels_only = step(shape, work.padded, work.labels)
    return {
        "hf": step(shape, work.padded, tokens),
        "trl": labels_only,
        "liger": step(shape, work.padded, tokens),
        "released": step(shape, work.padded, tokens, work.padded, tokens),
        "mle": mle,
        "cal": mle + contrast,
        "cal-padded": step(shape, work.padded, work.labels, work.padded_text),
        "cal-fp8": mle + contrast / 2,  # float8 products run at twice the rate of bfloat16
        "cal-every-4": mle + contrast / 4,
        "body": step(shape, work.padded, 0),
    }


def ladder(shape: Shape, work: Work | None = None) -> dict[str, float]:
    """From CAL as published to ours, one thing after the other: operations of the step as a share of hf's."""
    work = work or work_of(draw(shape)[0])
    hf = step(shape, work.padded, sum(work.padded))
    rungs = {
        "as published": step(shape, work.padded, sum(work.padded), work.padded, sum(work.padded)),
        "head at label rows, label logits by dot product": step(shape, work.padded, work.labels, work.padded),
        "contrast pass over the text alone": step(shape, work.padded, work.labels, work.padded_text),
        "contrast pass without padding": step(shape, work.padded, work.labels, work.text),
        "main pass without padding": step(shape, work.rows, work.labels, work.text),
        "contrast pass from the image on": step(shape, work.rows, work.labels, work.after, before=work.before),
    }
    return {name: flops / hf for name, flops in rungs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")
    options = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        work = work_of(draw(shape)[0])
        for variant, flops in (counted := floors(shape, work)).items():
            ratios = {"of_hf": flops / counted["hf"], "of_mle": flops / counted["mle"]}
            rows.append({"shape": name, "variant": variant, "tflop": flops / 1e12, **ratios})
    write("floors", rows, options.out)


if __name__ == "__main__":
    main()
