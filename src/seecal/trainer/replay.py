"""A step that was stopped, once more and alone: ``seecal replay FOLDER``. The files are those of ``bad_steps.py``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.enable import disable_cal, enable_cal
from ..core.options import CALOptions
from ..core.state import keep, state_of
from ..families.module_groups import GROUPS, group_of, module_groups
from ..families.table import unwrap
from ..models.loading import load_vlm
from .bad_steps import RANDOM, WEIGHTS


@dataclass
class ReplayedRecord:
    """One record of a micro-batch.

    Attributes:
        name: how errors call it.
        tokens: its label tokens.
        loss: its plain cross-entropy, nats a label token; nan without one.
        delta: the lowest and the highest Δ of its tokens with a contrast, in logits; None without one.
        finite: whether its losses and Δ are.
    """

    name: str
    tokens: int
    loss: float
    delta: tuple[float, float] | None
    finite: bool


@dataclass
class ReplayedBatch:
    """What one micro-batch gave, run alone.

    Attributes:
        rank, number: whose it was, and its place in the step.
        loss: of the micro-batch, as CAL weights it, nats.
        records: one by one.
        gradient_norms: group of modules → norm; "other" for what belongs to none.
        first_forward: the first module with an output that is not finite, and whether its input already was not; None.
        first_backward: the first module, from the loss backwards, where the gradient of an output is not finite; None.
        inputs: names of inputs that are not finite.
    """

    rank: int
    number: int
    loss: float
    records: list[ReplayedRecord]
    gradient_norms: dict[str, float]
    first_forward: str | None
    first_backward: str | None
    inputs: list[str] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether its losses, Δ and gradients are."""
        norms = torch.tensor([self.loss, *self.gradient_norms.values()])
        return all(one.finite for one in self.records) and bool(norms.isfinite().all())

    def lines(self) -> list[str]:
        """What :func:`replay` found, for people."""
        head = f"rank {self.rank}, micro-batch {self.number}: loss {self.loss:g}"
        found = [head + ("" if self.finite else "  NOT FINITE")]
        for one in self.records:
            delta = "no contrast" if one.delta is None else f"Δ {one.delta[0]:.4g} to {one.delta[1]:.4g}"
            odd = "" if one.finite else "  NOT FINITE"
            found.append(f"  {one.name}: {one.tokens} label tokens, loss {one.loss:.4g}, {delta}{odd}")
        norms = ", ".join(f"{group} {norm:.4g}" for group, norm in self.gradient_norms.items())
        found.append(f"  gradient norms: {norms or 'nothing trains'}")
        if self.inputs:
            found.append(f"  inputs that are not finite: {', '.join(self.inputs)}")
        if not self.finite and self.first_forward:
            found.append(f"  first output that is not finite: {self.first_forward}")
        if not self.finite and self.first_backward:
            found.append(
                f"  first gradient that is not finite, from the loss backwards: at the output of {self.first_backward}"
            )
        return found


@dataclass
class Replay:
    """What :func:`replay` found.

    Attributes:
        step: the number of the step.
        weights: which weights were used, and whether they are those of the step.
        exact: whether they are.
        batches: the micro-batches that were saved, rank by rank.
        weights_not_finite: names of parameters, as they were when it stopped.
    """

    step: int
    weights: str
    exact: bool
    batches: list[ReplayedBatch]
    weights_not_finite: list[str]

    @property
    def finite(self) -> bool:
        """Whether all of it is finite this time."""
        return all(one.finite for one in self.batches)

    def lines(self) -> list[str]:
        """For people."""
        found = [f"step {self.step}, with {self.weights}"]
        if self.weights_not_finite:
            found.append(f"weights that were not finite: {', '.join(self.weights_not_finite)}")
        found += [line for batch in self.batches for line in batch.lines()]
        bad = [f"micro-batch {one.number} of rank {one.rank}" for one in self.batches if not one.finite]
        found.append(f"not finite again: {', '.join(bad)}" if bad else "all of it is finite this time")
        return found


def replay(folder: str | Path, model: Any = None, *, device: str | torch.device | None = None) -> Replay:
    """Run the micro-batches of a step that was stopped again, each alone: forward, backward, no optimizer.

    Exact are the batch, the options of CAL, the random numbers at the start of each forward, and mixed precision. The
    weights are exact where the folder holds those that train (up to 1 GiB) and the others are still where the training
    took them from; otherwise the last checkpoint's are used, and ``Replay.weights`` says so. Not repeated is what other
    micro-batches and ranks add: the divisor of the loss is the micro-batch's own.

    Args:
        folder: ``output_dir/bad_steps/STEP``, as the error names it.
        model: a folder, a hub id or a loaded model to run it on as it is, in place of all this. A loaded one has CAL on
            afterwards only if it had before, and its gradients are left.
        device: None: a GPU if there is one.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no step that was saved, or its model cannot be loaded.
    """
    folder = Path(folder)
    told = _told(folder)
    first = told[0][0]
    network, weights, exact = _model(folder, first, model)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(network, nn.Module) and network is not model:
        network.to(place)
    place = next(network.parameters()).device
    options = CALOptions(**first["options"])
    found = []
    with _cal(network, options):
        for about, tensors in told:
            for batch in about["micro_batches"]:
                found.append(_run(network, about, batch, tensors, place))
    odd = sorted({name for about, _ in told for name in about["weights_not_finite"]})
    return Replay(first["step"], weights, exact, found, odd)


def _told(folder: Path) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """(what is said, the tensors) of each rank."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. It is output_dir/bad_steps/STEP, as the error names it.")
    files = sorted(folder.glob("bad_step-*-rank-*.json"), key=lambda one: int(one.stem.rpartition("-")[2]))
    if not files:
        raise ValueError(f"{folder}: no bad_step-STEP-rank-R.json: this is no step that was stopped.")
    found = []
    for file in files:
        tensors = file.with_suffix(".safetensors")
        try:
            about = json.loads(file.read_text("utf8"))
            found.append((about, load_file(tensors) if about["micro_batches"] else {}))
        except Exception as error:  # JSON's, safetensors' and the system's
            raise ValueError(f"{file.with_suffix('')}: damaged ({' '.join(str(error).split())}).") from None
    if not any(about["micro_batches"] for about, _ in found):
        raise ValueError(
            f"{folder}: none of its files has a micro-batch: those of the rank that was not finite are missing."
        )
    return found


# ---- The model ----


def _model(folder: Path, about: dict[str, Any], given: Any) -> tuple[Any, str, bool]:
    """(the model, in words which weights it has, whether they are those of the step)."""
    if isinstance(given, nn.Module):
        return given, "the model that was given", False
    dtype = about["dtype"]
    if given is not None:
        return load_vlm(str(given), dtype=dtype, processor=False)[0], f"the weights of {given}", False
    saved = load_file(folder / WEIGHTS) if about["weights_saved"] and (folder / WEIGHTS).is_file() else None
    adapted = (folder / "adapter_config.json").is_file()
    if saved is None:
        place = about["checkpoint"] or about["model"]
        if not place:
            raise ValueError(f"{folder}: the weights were not saved and no checkpoint is known. Give --model.")
        what = "the last checkpoint" if about["checkpoint"] else "the model before the training"
        network = load_vlm(place, dtype=dtype, processor=False)[0]
        network.requires_grad_(True)
        return network, f"the weights of {place}, {what}: not those of the step", False
    network = _frozen_part(folder, about)
    if adapted:
        from peft import PeftConfig, get_peft_model

        network = get_peft_model(network, PeftConfig.from_pretrained(str(folder)))
    _lay_on(network, saved, folder, about["trains"])
    if about["quantized"]:
        return network, "the weights of the step; the frozen ones were quantized then and are not now", False
    return network, "the weights of the step", True


def _frozen_part(folder: Path, about: dict[str, Any]) -> Any:
    """The model that the saved weights are laid on."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    if about["model"]:
        kind = {"attn_implementation": about["attention"]} if about["attention"] else {}
        try:
            return load_vlm(about["model"], dtype=about["dtype"], processor=False, **kind)[0]
        except ValueError as error:
            raise ValueError(
                f"{error} The step was trained from it: give --model, or correct 'model' in {folder}."
            ) from None
    if not about["all_weights_train"]:
        raise ValueError(f"{folder}: where the frozen weights came from is not known. Give --model.")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, about["dtype"]))


def _lay_on(network: nn.Module, saved: dict[str, Tensor], folder: Path, trains: list[str]) -> None:
    parameters = dict(network.named_parameters())
    if unknown := sorted(saved.keys() - parameters.keys()):
        raise ValueError(f"{folder}: {WEIGHTS} is of another model: {unknown[0]} is not in {type(network).__name__}.")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].data = value.to(parameters[name].device)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trains)


@contextlib.contextmanager
def _cal(network: Any, options: CALOptions) -> Iterator[None]:
    """CAL with these options inside the block, as it was before after it."""
    target = unwrap(network)
    before, was_training = state_of(target), network.training
    if before.options is not None:
        disable_cal(network)
    enable_cal(network, options)
    network.train()
    try:
        yield
    finally:
        disable_cal(network)
        network.train(was_training)
        if before.options is not None:
            enable_cal(network, before.options)
            state = state_of(target)
            state.by_trainer, state.counts_top1 = before.by_trainer, before.counts_top1
            keep(target, state)


# ---- One micro-batch ----


def _run(
    network: Any, about: dict[str, Any], batch: dict[str, Any], tensors: dict[str, Tensor], place: Any
) -> ReplayedBatch:
    prefix = f"{batch['number']}/"
    own = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    random = {name.removeprefix(RANDOM): own.pop(name) for name in list(own) if name.startswith(RANDOM)}
    inputs = {**{name: one.to(place) for name, one in own.items()}, **batch["inputs"]}
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and place.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], place)
    network.zero_grad()
    state = state_of(unwrap(network))
    state.step = about["step"] - 1
    scale = about["loss_scale"] or 1.0
    autocast: Any = contextlib.nullcontext()
    if about["mixed_precision"] in ("bf16", "fp16"):
        kind = torch.bfloat16 if about["mixed_precision"] == "bf16" else torch.float16
        autocast = torch.autocast(place.type, kind)
    with _FirstOdd(unwrap(network)) as first:
        with autocast:
            output = network(**inputs)
        if output.loss.requires_grad:
            (output.loss * scale).backward()
    return ReplayedBatch(
        rank=about["rank"],
        number=batch["number"],
        loss=output.loss.item(),
        records=_records(output.cal, batch["records"]),
        gradient_norms=_norms(network, scale),
        first_forward=first.forward,
        first_backward=first.backward,
        inputs=sorted(batch["inputs_not_finite"]),
    )


def _records(cal: Any, names: list[str]) -> list[ReplayedRecord]:
    delta = cal.visual_delta
    rows = max([len(names), *(int(one) + 1 for one in delta.sample.tolist())])
    found = []
    for row in range(rows):
        own = delta.sample == row
        losses, seen = cal.token_losses[own], delta.delta[own & delta.has_contrast]
        odd = [losses, delta.delta[own]]
        odd += [] if delta.logit_with is None else [delta.logit_with[own]]
        found.append(
            ReplayedRecord(
                name=names[row] if row < len(names) else f"row {row}",
                tokens=len(losses),
                loss=losses.mean().item() if len(losses) else float("nan"),
                delta=(seen.min().item(), seen.max().item()) if len(seen) else None,
                finite=all(bool(one.isfinite().all()) for one in odd),
            )
        )
    return found


def _norms(network: Any, scale: float) -> dict[str, float]:
    groups = module_groups(unwrap(network))
    squares: dict[str, list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            continue
        bare = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        group = "lora" if "lora_" in name else group_of(bare, groups, GROUPS) or "other"
        squares.setdefault(group, []).append((parameter.grad.float() / scale).norm())
    return {group: torch.stack([one.cpu() for one in norms]).norm().item() for group, norms in squares.items()}


class _FirstOdd:
    """Inside the block: which module of a model is the first with an output that is not finite, and with a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.forward: str | None = None
        self.backward: str | None = None

    def __enter__(self) -> _FirstOdd:
        modules = [(name or type(self._model).__name__, one) for name, one in self._model.named_modules()]
        self._hooks = [one.register_forward_hook(self._looking(name)) for name, one in modules]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _looking(self, name: str) -> Any:
        def look(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            found = [one for one in _tensors(output) if one.is_floating_point()]
            if self.forward is None and any(not bool(one.isfinite().all()) for one in found):
                odd = any(not bool(one.isfinite().all()) for one in _tensors(given) if one.is_floating_point())
                self.forward = f"{name} ({type(module).__name__}){', whose input already is not' if odd else ''}"
            for one in found:
                if one.requires_grad:
                    one.register_hook(lambda gradient: self._look_back(name, module, gradient))

        return look

    def _look_back(self, name: str, module: nn.Module, gradient: Tensor) -> None:
        if self.backward is None and not bool(gradient.isfinite().all()):
            self.backward = f"{name} ({type(module).__name__})"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [one for inner in value.values() for one in _tensors(inner)]
    return [one for inner in value for one in _tensors(inner)] if isinstance(value, (list, tuple)) else []
