"""What TRL's and transformers' trainers have to be told, or must not see or do, so that CALTrainer can be one."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from trl.trainer import sft_trainer
from trl.trainer.utils import add_fused_lm_head

from ..families.table import family_of, unwrap
from ..models.loading import is_adapter
from ..models.trusted_files import check_adapter, check_config, check_weights
from .cal_config import CALConfig


def patch_eval_head(model: Any) -> None:
    """TRL's fused head, which evaluates, reads soft-cap and scale off the text config. Some vision-language classes do not
    apply what is there (Gemma 3, Aya, Cohere 2): for those it is put on again, reading what the class does."""
    scale, softcap = family_of(model).head(model.config)
    text = model.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    kept = {name: getattr(text, name) for name in names if hasattr(text, name)}
    says = kept.get("logit_scale") or 1 / (kept.get("logits_scaling") or 1.0), kept.get("final_logit_softcapping")
    if says == (scale, softcap):
        return
    text.final_logit_softcapping, text.logit_scale = softcap, scale
    try:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    finally:
        for name in names:
            if name in kept:
                setattr(text, name, kept[name])
            elif hasattr(text, name):
                delattr(text, name)


@contextlib.contextmanager
def hide_cal_fields_from_trl(args: CALConfig, our_collator: bool) -> Iterator[None]:
    """SFTTrainer reads ``padding_free`` as its own option, and refuses or acts on ``assistant_only_loss``, which our
    collator does anyway: both look off while it sets itself up. So does ``torch_compile``: accelerate would compile the
    whole model, CAL's forward too; ours compiles layers."""
    kept = args.padding_free, args.assistant_only_loss, args.torch_compile_backend, args.torch_compile_mode
    args.padding_free = False  # type: ignore[assignment]
    args.assistant_only_loss = args.assistant_only_loss and not our_collator
    args.torch_compile_backend = args.torch_compile_mode = None
    try:
        yield
    finally:
        args.padding_free, args.assistant_only_loss, args.torch_compile_backend, args.torch_compile_mode = kept


# What of model_init_kwargs says where a model's config lies
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@contextlib.contextmanager
def only_trusted_files(model: Any, args: CALConfig) -> Iterator[None]:
    """A model given by its name is read as :func:`seecal.models.loading.load_vlm` reads it, but by SFTTrainer: safetensors
    alone, no kernels that its config names. What ``model_init_kwargs`` and ``trust_remote_code`` ask for is allowed.

    Raises:
        ValueError: a folder of an adapter, weights that are no safetensors, or a config that asks for machine code.
    """
    if not isinstance(model, str):
        yield
        return
    given: Any = args.model_init_kwargs
    options, folder = dict(given or {}), Path(model)
    if folder.is_dir():
        if is_adapter(folder):
            check_adapter(folder)
            raise ValueError(
                f"{model}: an adapter's folder, and no model that SFTTrainer loads by its name. Merge it first (seecal "
                "merge), or pass peft.PeftModel.from_pretrained(its model, this folder, is_trainable=True)."
            )
        check_weights(folder, options)
    if "config" not in options:
        trusted = bool(options.get("trust_remote_code", args.trust_remote_code))
        where = {name: options[name] for name in _WHERE if name in options}
        check_config(AutoConfig.from_pretrained(model, trust_remote_code=trusted, **where), model, options)
    args.model_init_kwargs = {"use_safetensors": True, **options}
    try:
        yield
    finally:
        args.model_init_kwargs = given


def take_off_mixed_precision(model: Any) -> None:
    """Takes off what accelerate left on a model in an earlier training, such as a plain SFTTrainer's: its wrapper around
    the forward, and its mark that nothing is to be wrapped again.

    The next trainer puts its own on. Under the old one CAL would run outside of mixed precision, or in that of before.
    """
    vars(model).pop("_is_accelerate_prepared", None)
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    del model.forward
    if getattr(original, "__func__", None) is not type(model).forward:
        model.forward = original


@contextlib.contextmanager
def keep_precision_of_adapters(model: Any) -> Iterator[None]:
    """What trains on a model in 4 bits stays in the precision that PEFT gave it, float32 for adapters.

    SFTTrainer makes it bfloat16 on a model that says it is in 4 bits. A projector that trains beside the adapters then no
    longer takes the tower's float32, and updates at 2e-5 round to nothing. So the model does not say so while SFTTrainer
    sets up; a model given by its name from when that has loaded it.
    """
    silent = []

    def silence(loaded: Any) -> Any:
        if isinstance(loaded, nn.Module) and vars(base := unwrap(loaded)).get("is_loaded_in_4bit", False):
            base.is_loaded_in_4bit = False
            silent.append(base)
        return loaded

    load = sft_trainer.create_model_from_path
    sft_trainer.create_model_from_path = lambda *args, **kwargs: silence(load(*args, **kwargs))
    try:
        silence(model)
        yield
    finally:
        sft_trainer.create_model_from_path = load
        for base in silent:
            base.is_loaded_in_4bit = True


@contextlib.contextmanager
def explain_quantised_copies(peft_config: Any) -> Iterator[None]:
    """PEFT copies ``modules_to_save`` and has the copies train; of quantised modules torch refuses that without a name."""
    try:
        yield
    except RuntimeError as error:
        names = getattr(peft_config, "modules_to_save", None)
        if not names or "floating point" not in str(error):
            raise
        raise ValueError(
            f"modules_to_save={list(names)}: these modules are quantised, and such weights do not train. Set "
            f"llm_int8_skip_modules={sorted({'lm_head', *names})} in the quantization_config, or take modules_to_save out."
        ) from None


def load_as_saved(model: Any, folder: str) -> None:
    """Loads a whole model's weights from what save_pretrained wrote to ``folder``.

    save_pretrained gives the weights of LLaVA and others the names of their first release, and only from_pretrained knows
    both. Trainer's own load_state_dict(strict=False) then finds no key and goes on with a warning, from scratch
    (huggingface/transformers#43701).

    They are read in the widest precision that the model holds anything in. from_pretrained's own choice is that of the
    config, which a model that was made float32 after loading, or its projector alone, does not have: each of those weights
    would be rounded to bfloat16 on the way.

    Raises:
        ValueError: the folder holds the weights of another model.
    """
    held = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
    loaded, report = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),  # loading writes the precision into it
        dtype=functools.reduce(torch.promote_types, held),
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
    )
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if name.endswith("_keys") and keys}
    if wrong:
        raise ValueError(f"{folder} does not hold this model's weights: {wrong}")
    model.load_state_dict(loaded.state_dict())
