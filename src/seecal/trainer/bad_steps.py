"""A step that must not be taken, as files that ``seecal replay`` runs again. Tensors and JSON, no pickle.

out/bad_steps/57/bad_step-57-rank-0.json          what was not finite, the records, options, where the weights are
out/bad_steps/57/bad_step-57-rank-0.safetensors   the micro-batches, "2/pixel_values" and "2/random.cpu"
out/bad_steps/57/weights.safetensors              the weights that train, as they were, where they are not too many
out/bad_steps/57/config.json, adapter_config.json what else makes the model
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..core.options import CALOptions
from ..families.table import unwrap
from .checkpoints import checkpoints_in
from .step_watch import BadStep, MicroBatch

FOLDER, WEIGHTS = "bad_steps", "weights.safetensors"
RANDOM = "random."
# Weights that train are saved up to this many bytes: adapters, a projector, a small model
WEIGHTS_LIMIT = 1 << 30
_LISTED = 32  # label tokens, and names of tensors


def stop_at(bad: BadStep, trainer: Any) -> NoReturn:
    """Save the step and stop, on all ranks. FloatingPointError names what is not finite, the records and the folder."""
    accelerator, args = trainer.accelerator, trainer.args
    about = {
        "epoch": trainer.state.epoch,
        "ranks": args.world_size,
        "seed": args.seed,
        "mixed_precision": accelerator.mixed_precision,
        "loss_scale": None if accelerator.scaler is None else float(accelerator.scaler.get_scale()),
    }
    model = accelerator.unwrap_model(trainer.model)
    try:
        folder = save_bad_step(Path(args.output_dir), bad, model, trainer.cal_options, about, args.process_index)
        saved = f"The step is saved: seecal replay {shlex.quote(str(folder))} runs it again alone."
    except OSError as error:
        saved = f"It could not be saved ({' '.join(str(error).split())})."
    accelerator.wait_for_everyone()  # a launcher ends the others when one has ended, in the middle of a file
    remedy = "Look at these records, lower learning_rate, or use bf16 instead of fp16."
    raise FloatingPointError(f"{bad.sentence()} {saved} {remedy}")


def name_of(step: int, rank: int) -> str:
    """The name of a rank's files, without their ending."""
    return f"bad_step-{step}-rank-{rank}"


def save_bad_step(
    out: Path, bad: BadStep, model: Any, options: CALOptions, about: Mapping[str, Any], rank: int
) -> Path:
    """Write a bad step of this rank below ``out``; the first rank writes the weights too. Returns the step's folder.

    Args:
        out: the run's output folder.
        bad: what is not finite.
        model: what trains, without the wrappers of several ranks; with or without PEFT's.
        options: under which its forward ran.
        about: what else is to be known: epoch, ranks, seed, mixed_precision, loss_scale. JSON.
        rank: of this process.

    Raises:
        OSError: no room, or the folder cannot be written.
    """
    folder = out / FOLDER / str(bad.step)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    batches = [_described(batch, tensors) for batch in bad.batches]
    if tensors:
        _write_tensors(folder / f"{name_of(bad.step, rank)}.safetensors", tensors)
    weights = _weights(model)
    if rank == 0:
        _write_model(folder, model, weights)
    newest = next(reversed(checkpoints_in(out)), None)
    inner = unwrap(model)
    told = {
        "format": 1,
        "step": bad.step,
        "rank": rank,
        "loss": f"{bad.loss:g}",
        "gradient_norm": f"{bad.norm:g}",
        "ranks_not_finite": bad.ranks,
        "micro_batches_of_the_step": bad.of,
        "micro_batches": batches,
        "weights_not_finite": _odd_weights(model),
        "weights_saved": weights is not None,
        "checkpoint": None if newest is None else str(newest.resolve()),
        "model": str(getattr(inner.config, "_name_or_path", "") or ""),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "attention": getattr(inner.config, "_attn_implementation", None),
        "quantized": bool(getattr(inner, "is_quantized", False)),
        "trains": [name for name, one in model.named_parameters() if one.requires_grad],
        "all_weights_train": all(one.requires_grad for one in model.parameters()),
        "options": dataclasses.asdict(options),
        **about,
    }
    (folder / f"{name_of(bad.step, rank)}.json").write_text(json.dumps(told, indent=1) + "\n", "utf8")
    return folder


def _described(batch: MicroBatch, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A micro-batch as JSON; its tensors are added to ``tensors``."""
    plain, left_out, odd_inputs = {}, [], {}
    for name, value in batch.inputs.items():
        if isinstance(value, Tensor):
            tensors[f"{batch.number}/{name}"] = value
            if value.is_floating_point() and (count := int((~value.isfinite()).sum())):
                odd_inputs[name] = count
        elif value is None or isinstance(value, (bool, int, float, str)):
            plain[name] = value
        else:
            left_out.append(name)
    tensors |= {f"{batch.number}/{RANDOM}{name}": state for name, state in batch.random.items()}
    return {
        "number": batch.number,
        "records": list(batch.records),
        "suspects": batch.suspects(),
        "inputs": plain,
        "inputs_left_out": left_out,
        "inputs_not_finite": odd_inputs,
        "not_finite": {name: _places(batch, odd) for name, odd in batch.odd.items() if bool(odd.any())},
    }


def _places(batch: MicroBatch, odd: Tensor) -> dict[str, Any]:
    """How many label tokens, and the first of them with row, column and id."""
    columns = [one[odd][:_LISTED].tolist() for one in (batch.sample, batch.position, batch.labels) if one is not None]
    first = [dict(zip(("row", "column", "token_id"), one, strict=True)) for one in zip(*columns, strict=True)]
    return {"tokens": int(odd.sum()), "of": len(odd), "first": first}


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _odd_weights(model: Any) -> list[str]:
    """Names of parameters that are not finite, the first of them."""
    named = ((name, _local(one.detach())) for name, one in model.named_parameters())
    return [name for name, one in named if one.is_floating_point() and not bool(one.isfinite().all())][:_LISTED]


def _weights(model: Any) -> dict[str, Tensor] | None:
    """The weights that train; None where they are shards, elsewhere (DeepSpeed ZeRO-3) or too many."""
    found = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    sharded = any(isinstance(one, DTensor) or one.numel() == 0 for one in found.values())
    size = sum(one.numel() * one.element_size() for one in found.values())
    return None if sharded or size > WEIGHTS_LIMIT else found


def _write_model(folder: Path, model: Any, weights: dict[str, Tensor] | None) -> None:
    if weights is None:
        return
    _write_tensors(folder / WEIGHTS, weights)
    unwrap(model).config.save_pretrained(folder)
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.save_pretrained(str(folder))


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies: safetensors refuses tensors that share their memory
    whole = {name: one.detach().to("cpu", copy=True).contiguous() for name, one in tensors.items()}
    try:
        save_file(whole, path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        if isinstance(error, OSError):
            raise
        raise OSError(f"{path}: {' '.join(str(error).split())}") from error
