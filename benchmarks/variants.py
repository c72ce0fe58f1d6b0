"""The training steps that are compared. Each is a loss on the same parameters and the same batch.

hf           the model's own forward(labels=…): logits of every token
body         hf without its head and loss: what no way of computing the loss can save
trl          what SFTTrainer runs: TRL's fused head, log-probabilities of the label rows without their logits
liger        Liger-Kernel's fused linear cross-entropy over the decoder's output, where it is installed
released     CAL as published: image tokens masked, every one of them computed again, full float32 logits twice
mle          ours, plain: every label counts the same, no pass without the image
cal          ours: both passes in one forward, the second over the text alone
cal-padded   ours with padding_free=False: what leaving the padding out buys
cal-fp8      ours, the pass without the image in float8 products
cal-every-4  ours, the pass without the image in one step of four
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import lacks
from shapes import IMAGE

import seecal
from seecal import CALOptions

PLAIN = ("hf", "body", "trl", "liger", "released")
OURS: dict[str, dict[str, Any]] = {
    "mle": {"weighting": "uniform"},
    "cal": {},
    "cal-padded": {"padding_free": False},
    "cal-fp8": {"fp8_contrast": True},
    "cal-every-4": {"contrast_every": 4},
}
LIBRARIES = {
    "trl": ("trl.trainer.utils", "add_fused_lm_head"),
    "liger": ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
}
EXTRA = ("cal-fp8", "cal-every-4", "body")
NAMES = (*PLAIN, *OURS)
DEFAULT = tuple(name for name in NAMES if name not in EXTRA)
ON_CPU = ("hf", "trl", "released", "mle", "cal")  # what is compared where a round takes minutes
Batch = dict[str, torch.Tensor]


@dataclass
class Variant:
    """``loss`` runs one forward. ``model``: whose forward has a CAL record, None where there is none. ``every``: forwards
    until the variant has done each kind of step once. ``twice``: without a record, all tokens are computed twice."""

    loss: Callable[[], torch.Tensor]
    model: Any = None
    every: int = 1
    twice: bool = False

    def tokens(self, batch: Batch) -> tuple[float, float]:
        """TokenPositions that go through the decoder with and without the image, in the mean of ``every`` forwards."""
        padded = batch["input_ids"].numel()
        if self.model is None:
            return padded, padded * self.twice
        with torch.no_grad():
            records = [self.model(**batch).cal for _ in range(self.every)]
        if self.every == 1:
            return records[0].main_tokens, records[0].contrast_tokens
        mean = [sum(getattr(one, name) for one in records) / self.every for name in ("main_tokens", "contrast_tokens")]
        return mean[0], mean[1]


def missing(name: str, where: torch.device) -> str | None:
    """Why this variant cannot run here; None where it can."""
    fields = {field.name for field in dataclasses.fields(CALOptions)}
    if name in LIBRARIES and (why := lacks(*LIBRARIES[name])):
        return why
    if unknown := sorted(set(OURS.get(name, {})) - fields):
        return f"this seecal has no option {', '.join(unknown)}"
    if name == "cal-fp8" and (where.type != "cuda" or torch.cuda.get_device_capability() < (8, 9)):
        return "float8 products need a GPU of compute capability 8.9"
    return None


def make(name: str, model: Any, batch: Batch) -> Variant:
    """The variant over ``model``'s parameters. The copy is shallow: another forward on the same modules."""
    if name == "hf":
        return Variant(lambda: model(**batch, use_cache=False).loss)
    if name == "body":
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return Variant(lambda: model.model(**inputs, use_cache=False)[0].mean())
    if name == "trl":
        return Variant(trl(model, batch))
    if name == "liger":
        return Variant(lambda: liger(model, batch))
    if name == "released":
        return Variant(lambda: released(model, batch), twice=True)
    options = CALOptions(**OURS[name])
    ours = seecal.enable_cal(copy.copy(model), options)
    return Variant(lambda: ours(**batch).loss, ours, getattr(options, "contrast_every", 1))


def trl(model: Any, batch: Batch) -> Callable[[], torch.Tensor]:
    """The loss of SFTTrainer.compute_loss in TRL 1.16, without its logging."""
    from trl.trainer.utils import add_fused_lm_head

    fused = copy.copy(model)
    add_fused_lm_head(fused, outputs=("log_probs", "entropy", "is_top1"))

    def loss() -> torch.Tensor:
        out = fused(**batch, use_cache=False, fused_lm_head=True)
        return -out.log_probs.sum() / out.label_mask.sum().clamp(min=1)

    return loss


def liger(model: Any, batch: Batch) -> torch.Tensor:
    """As Liger's patched forwards do: every token goes to the fused loss, labels of -100 are ignored there."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs, use_cache=False)[0][:, :-1]
    labels = batch["labels"][:, 1:].reshape(-1)
    return LigerFusedLinearCrossEntropyLoss()(model.lm_head.weight, hidden.reshape(-1, hidden.shape[-1]), labels)


def released(model: Any, batch: Batch) -> torch.Tensor:
    """The published way: features once, then the decoder and the head on full rows twice, in float32."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    embeds = merged(model, batch)
    without_image = mask * (ids != IMAGE)
    with torch.no_grad():
        without = model(inputs_embeds=embeds, attention_mask=without_image, use_cache=False).logits.float()[:, :-1]
    logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
    labels = batch["labels"][:, 1:]
    targets = labels.clamp(min=0)[..., None]
    delta = (logits.detach().gather(-1, targets) - without.gather(-1, targets))[..., 0].clamp(1, 5)
    weights = torch.nn.functional.avg_pool1d(delta.reshape(1, 1, -1), 3, 1, 1, count_include_pad=False).view_as(delta)
    weights = weights * (labels != -100)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(weights)
    return (weights * ce).sum() / weights.sum()


def merged(model: Any, batch: Batch) -> torch.Tensor:
    """[B, L, D] embeddings with the image features in the placeholders' stead."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    features = model.model.get_image_features(pixel_values=batch["pixel_values"])
    features = getattr(features, "pooler_output", features)  # a list of tiles, or one tensor
    features = torch.cat(list(features)).to(embeds.dtype)
    return embeds.masked_scatter((batch["input_ids"] == IMAGE)[..., None], features)
