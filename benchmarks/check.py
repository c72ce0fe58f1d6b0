"""Is it right on this device? Before anything is timed: every route of our forward against plain code in double precision.

Truth is the equations in a few lines, in float64: two calls of the model with full logits, the second with the image
masked. The same lines in bfloat16 set the error that is allowed: ours may be off by half as much again, and no more. In
float32 every route has to agree with the truth to ``EXACT``. Compared are Δ, the loss and the gradients of every part, as
|ours - truth| / |truth| in the 2-norm, with alpha = 0 so that every Δ above 0 counts in the weights.

Exit code 1 if anything is off.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from typing import Any

import torch
from common import arguments, device, progress, write
from shapes import IMAGE, SHAPES, Shape, Vision, batch_of, build
from variants import OURS, Batch, merged, missing

import seecal
from seecal import CALOptions

OPTIONS = CALOptions(alpha=0.0)
ROUTES: dict[str, dict[str, Any]] = {
    "drop, default": {},
    "drop, padding_free=True": {"padding_free": True},
    "drop, padding_free=False": {"padding_free": False},
    "mask": {"contrast": "mask"},
}
# Approximations by design: their error is written down where they run, and not judged.
REPORTED = {"cal-fp8": OURS["cal-fp8"]}
EXACT, SLACK = 1e-4, 1.5
# A loss is one number, and may be right by luck: it is never asked to be nearer than bfloat16 can say.
_BF16 = 2.0**-8
SIZES = {
    "tiny": SHAPES["tiny"],
    "gpu": Shape(
        layers=4, hidden=1024, inter=2816, heads=8, vocab=32064, tiles=1, batch=4, text=(100, 500),
        vision=Vision(hidden=256, inter=1024, layers=4, heads=4, image=336, patch=14),
    ),
}  # fmt: skip
Found = dict[str, torch.Tensor]


def plain(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(Δ [N], loss) by the equations."""
    mask, labels = batch["attention_mask"], batch["labels"][:, 1:]
    embeds = merged(model, batch)
    row, column = (labels != -100).nonzero(as_tuple=True)
    label = labels[row, column]
    without_image = mask * (batch["input_ids"] != IMAGE)
    with torch.no_grad():
        without = model(inputs_embeds=embeds, attention_mask=without_image, use_cache=False).logits[row, column]
    logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[row, column]
    wide = torch.promote_types(logits.dtype, torch.float32)
    delta = (logits.to(wide) - without.to(wide)).detach().gather(1, label[:, None])[:, 0]
    # a sample of these batches has one run of labels, so its row is the run
    weights = seecal.token_weights(delta, row, OPTIONS.alpha, OPTIONS.beta, OPTIONS.window).to(wide)
    ce = torch.nn.functional.cross_entropy(logits.to(wide), label, reduction="none")
    return delta, (weights * ce).sum() / weights.sum()


def ours(model: Any, batch: Batch, route: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    output = seecal.enable_cal(copy.copy(model), dataclasses.replace(OPTIONS, **route))(**batch)
    return output.cal.visual_delta.delta, output.loss


def found(model: Any, batch: Batch, route: dict[str, Any] | None) -> Found:
    """Δ, loss and the gradients of each part, in float64. ``route``: None for the plain lines."""
    model.zero_grad(set_to_none=True)
    delta, loss = plain(model, batch) if route is None else ours(model, batch, route)
    loss.backward()
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = "head" if name.startswith("lm_head") else "projector" if "projector" in name else "decoder"
            parts.setdefault(f"gradient of the {part}", []).append(parameter.grad.flatten().double())
    return {"delta": delta.double(), "loss": loss.detach().double()} | {k: torch.cat(v) for k, v in parts.items()}


def error(one: torch.Tensor, truth: torch.Tensor) -> float:
    return float((one - truth).norm() / truth.norm())


def compare(shape: Shape, where: torch.device) -> list[dict[str, Any]]:
    low = build(shape, where, torch.bfloat16)
    batch = batch_of(shape, where, torch.bfloat16)

    def cast(dtype: torch.dtype) -> tuple[Any, Batch]:
        # The model as it was made keeps the frequencies of its position ids in float32; .to() would round them.
        wide = low if dtype == torch.bfloat16 else copy.deepcopy(low).to(dtype)
        return wide, {**batch, "pixel_values": batch["pixel_values"].to(dtype)}

    truth = found(*cast(torch.float64), None)
    naive = {name: error(value, truth[name]) for name, value in found(low, batch, None).items()}
    rows = [_row("plain", "bfloat16", name, value, float("nan")) for name, value in naive.items()]
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = cast(dtype)
        for name, route in ROUTES.items():
            for quantity, value in found(model, inputs, route).items():
                allowed = EXACT if dtype == torch.float32 else SLACK * naive[quantity]
                if dtype == torch.bfloat16 and quantity == "loss":
                    allowed = max(allowed, _BF16)
                rows.append(_row(name, str(dtype).split(".")[1], quantity, error(value, truth[quantity]), allowed))
    for name, route in REPORTED.items():
        if missing(name, where) is None:
            for quantity, value in found(low, batch, route).items():
                rows.append(_row(name, "bfloat16", quantity, error(value, truth[quantity]), float("nan")))
    return rows


def _row(route: str, dtype: str, quantity: str, off: float, allowed: float) -> dict[str, Any]:
    ok = "" if allowed != allowed else "yes" if off <= allowed else "NO"  # NaN is never at most anything
    shown = "" if allowed != allowed else f"{allowed:.1e}"
    return {"route": route, "dtype": dtype, "quantity": quantity, "error": f"{off:.1e}", "allowed": shown, "ok": ok}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpu" if torch.cuda.is_available() else "tiny")
    arguments(parser)
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32 here
    with progress() as shown, shown.task("checking"):
        rows = compare(SIZES[options.size], device())
    write(f"check-{options.size}", rows, options.out)
    wrong = [row for row in rows if row["ok"] == "NO"]
    for row in wrong:
        print(f"{row['dtype']} {row['route']}: {row['quantity']} is off by {row['error']}, allowed {row['allowed']}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
