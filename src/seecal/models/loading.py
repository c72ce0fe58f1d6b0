"""Load a vision-language model and its processor, from a folder or a hub id, or say in one line why not."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .quantised import dequantised, four_bit_layers
from .trusted_files import check_adapter, check_config, check_weights

logger = logging.getLogger(__name__)

# Tensors of modules that the model has and that change nothing in it: buffers that older versions saved, scales of a cache
_HARMLESS = re.compile(r"(^|[._])(inv_freq|position_ids|num_batches_tracked|[kv]_scale)$")
# What stands behind a tower's layers and reads all of its patches, where a part calls it so: no patch's features need it
_POOLING = ("head.", "classifier.", "attn_pool.")
_ADAPTERS_MODEL = "Write the folder of the model that it was trained on there."


def load_vlm(model: str, *, dtype: Any = "auto", processor: bool = True, **options: Any) -> tuple[Any, Any]:
    """(model in eval mode, processor or None). No code of its author is run, no pickle read; a folder is read offline.

    Args:
        model: a folder, or a hub id (owner/name). The folder of an adapter stands for the model that it was trained on with
            the adapter in its weights.
        dtype: "auto": the precision it was saved in.
        processor: whether to load it too.
        options: more arguments of ``from_pretrained``. ``use_safetensors=False`` reads PyTorch files too.

    Raises:
        ValueError: nothing there, no model, a model that takes no images, or one that lacks tensors: those would start from
            random numbers; tensors of a part that the model has and that its class does not read; an adapter whose model is
            not there; weights that are no safetensors, a config that asks for code.
    """
    folder = Path(model)
    if not folder.is_dir():
        refuse_missing(model, folder)
    elif is_adapter(folder):
        return _with_adapter(folder, processor, {"dtype": dtype, **options})
    else:
        refuse_other_folders(folder)
        check_weights(folder, options)

    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as KNOWN

    local = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
    try:
        config = _read(AutoConfig, model, local)
        if type(config) not in KNOWN:
            raise ValueError(f"{model}: a {config.model_type} model takes no images: give a vision-language model")
        check_config(config, model, options)
        its_processor = _read(AutoProcessor, model, local) if processor else None
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, output_loading_info=True, **local, **{"use_safetensors": True, **options}
        )
    except OSError as error:
        raise ValueError(f"{model}: cannot be loaded: {first_line(error)}") from None
    except SafetensorError as error:
        raise ValueError(f"{model}: its weights are cut off or damaged ({first_line(error)}). Copy it again.") from None
    except ImportError as error:  # a quantised model's library
        wanted = " Run pip install 'seecal[qlora]'." if "bitsandbytes" in str(error) else ""
        raise ValueError(f"{model}: cannot be loaded: {first_line(error)}{wanted}") from None
    except (
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # wrong shapes, half a tokenizer, odd arguments
        raise ValueError(
            f"{model}: cannot be loaded ({type(error).__name__}: {first_line(error)}). Look at its files, and at "
            "model_init_kwargs if there are any."
        ) from error
    network, report = loaded
    if missing := sorted(map(str, report["missing_keys"])):
        raise ValueError(
            f"{model}: lacks {len(missing)} of the model's tensors, {missing[0]} for one, which would start from random "
            "numbers. Copy the folder again."
        )
    account_for(report["unexpected_keys"], network, model)
    return network.eval(), its_processor


def account_for(unexpected: Iterable[str], network: Any, name: str) -> None:
    """ValueError for tensors of the files that the model has no place for, where they would be lost in silence.

    transformers leaves all of them out with a warning, less those that the class says it ignores. A tensor that belongs
    inside a part which the model has, such as the bias of its lm_head, a norm in its layers or an adapter beside a matrix,
    was computed with by who saved it: without it the model is another one. What is a whole part more, such as a tower's
    pooling head, layers that predict several tokens at once, a second model, is left out with a warning here too:
    published checkpoints carry such, and what the model has computes the same without.
    """
    modules = dict(network.named_modules())
    beside = []
    for one in sorted(map(str, unexpected)):
        place = one.rpartition(".")[0]
        while place not in modules:
            place = place.rpartition(".")[0]
        within = one[len(place) :].lstrip(".")
        if _HARMLESS.search(one) or within.startswith(_POOLING) or _holds_parts(modules[place]):
            beside.append(one)
            continue
        raise ValueError(
            f"{name}: its files have {one}, which belongs into {place} and which a {type(network).__name__} does not read, "
            "so the model would compute something else than the one that was saved. Give the config.json that belongs to "
            "these weights; adapters are merged first, and what no class here computes cannot be loaded."
        )
    if beside:
        logger.warning(
            "%s: %d tensors of its files are no part of a %s and are left out, %s for one.",
            name, len(beside), type(network).__name__, beside[0],
        )  # fmt: skip


def _holds_parts(module: Any) -> bool:
    """Whether parts stand side by side in it: a whole model or tower, and a list of layers."""
    from torch import nn
    from transformers import PreTrainedModel

    return isinstance(module, (PreTrainedModel, nn.ModuleList))


def load_processor(model: str) -> Any:
    """The processor of a vision-language model, without its weights: from its folder, offline, or by its hub id.

    Raises:
        ValueError: nothing there, no processor, or one that takes no images.
    """
    from transformers import AutoProcessor, ProcessorMixin

    folder = Path(model)
    if not folder.is_dir():
        refuse_missing(model, folder)
    elif is_adapter(folder):
        return processor_beside(folder, source_of(folder))
    else:
        refuse_other_folders(folder)
    try:
        processor = AutoProcessor.from_pretrained(model, local_files_only=folder.is_dir(), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{model}: its processor cannot be loaded: {first_line(error)}") from None
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{model}: no processor for images here, only a {type(processor).__name__}: give a vision-language model's "
            "folder, with its processor_config.json or preprocessor_config.json."
        )
    return processor


def refuse_missing(model: str, folder: Path) -> None:
    """A path that is not there, told from a hub id such as llava-hf/llava-1.5-7b-hf."""
    if folder.exists():
        raise ValueError(f"{model}: this is a file. Give the folder that holds config.json.")
    looks_like_id = model.count("/") <= 1 and not model.startswith((".", "/", "~")) and model.count("/") == 1
    if not looks_like_id or folder.parent.is_dir():
        raise ValueError(f"{model}: no such folder. Give a model's folder, or a hub id (owner/name).")


def refuse_other_folders(folder: Path) -> None:
    config = folder / "config.json"
    if not config.exists():
        if inside := _model_inside(folder):
            raise ValueError(f"{folder}: no config.json here, but there is one in {inside}: give that folder.")
        if any(folder.glob("pytorch_model_fsdp_*")) or any(folder.glob("global_step*")):
            raise ValueError(
                f"{folder}: no config.json here: this is a checkpoint in the shards of FSDP or DeepSpeed. Continue its run "
                "with --resume and give its final folder."
            )
        raise ValueError(
            f"{folder}: no model in this folder: it has no config.json, and no adapter_config.json of an adapter."
        )
    try:
        found = json.loads(config.read_text("utf8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{config}: not valid JSON; the model's folder is damaged. Copy it again.") from None
    if isinstance(found, dict) and "mm_vision_tower" in found:
        raise ValueError(
            f"{folder}: a checkpoint in the layout of LLaVA's or Mini-Gemini's own code (config.json has mm_vision_tower). "
            "Run seecal convert on it and give the folder that it writes."
        )


def _model_inside(folder: Path) -> Path | None:
    """The folder further inside that is meant: what a run and the demo leave, where people put a model, and of a run that
    has not ended the newest that it has."""
    for name in ("final", "run/final", "model", "adapter"):
        if _is_model(folder / name):
            return folder / name
    stages = sorted(folder.glob("stage-*"), key=_number, reverse=True)
    for stage in [*stages, folder]:
        if _is_model(stage / "model"):
            return stage / "model"
        for checkpoint in sorted(stage.glob("checkpoint-*"), key=_number, reverse=True):
            if _is_model(checkpoint):
                return checkpoint
    return None


def _number(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_adapter(folder)


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists()


def _with_adapter(adapter: Path, processor: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    """What :func:`load_vlm` gives for the folder of an adapter, which names the model that it was trained on."""
    source = source_of(adapter)
    try:
        network = merge(source, adapter, **options)
    except ValueError as error:
        raise ValueError(
            f"{adapter}: an adapter for the model that base_model_name_or_path in adapter_config.json names: {error} If it "
            f"lies elsewhere: {_ADAPTERS_MODEL}"
        ) from None
    return network.eval(), processor_beside(adapter, source) if processor else None


def source_of(adapter: Path) -> str:
    """The model that an adapter was trained on."""
    config = adapter / "adapter_config.json"
    try:
        source = json.loads(config.read_text("utf8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{config}: not valid JSON; the adapter's folder is damaged. Copy it again.") from None
    check_adapter(adapter)
    if not source or Path(source).resolve() == adapter.resolve():
        raise ValueError(f"{config}: its base_model_name_or_path is {source!r}, which is no model. {_ADAPTERS_MODEL}")
    return str(source)


def processor_beside(adapter: Path, source: str) -> Any:
    """The processor saved with an adapter, else its model's."""
    from transformers import AutoProcessor

    own = any((adapter / name).exists() for name in ("processor_config.json", "preprocessor_config.json"))
    local = {"local_files_only": own or Path(source).is_dir(), "trust_remote_code": False}
    return AutoProcessor.from_pretrained(adapter if own else source, **local)


def _read(kind: Any, model: str, local: dict[str, Any]) -> Any:
    """What AutoConfig or AutoProcessor makes of the model's files; ValueError in one line."""
    try:
        return kind.from_pretrained(model, **local)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{model}: it works only with custom code from its author, which seecal does not run. Give a model of "
                "one of transformers' own families."
            ) from None
        raise ValueError(f"{model}: cannot be loaded: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def adapted(source: str, adapter: Path, **init_kwargs: Any) -> Any:
    """The model in ``source`` with the adapter on it, as PEFT's model. ValueError if the adapter lacks a tensor.

    A model in 4 bits becomes the float weights that the 4 bits stand for (:func:`quantised.dequantised`).
    """
    from peft import PeftModel

    check_adapter(adapter)
    model, _ = load_vlm(source, processor=False, **init_kwargs)
    if four_bit_layers(model):
        model = dequantised(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(adapter))
        except (UserWarning, KeyError) as error:
            raise ValueError(f"{adapter} does not hold all that was trained: {error}") from None
        except (RuntimeError, ValueError) as error:  # other shapes, other modules
            raise ValueError(f"{adapter} was not trained on {source}: {first_line(error)}") from None


def merge(source: str, adapter: Path, **init_kwargs: Any) -> Any:
    """The model in ``source`` with the adapter in its weights: :func:`adapted`, merged."""
    return merge_in(adapted(source, adapter, **init_kwargs))


def merge_in(model: Any) -> Any:
    """PEFT's model with its adapter in the weights; its config says whether word table and head are one matrix still.

    An adapter on one of them, or one of them saved whole, takes a tied pair apart. Tied, PEFT would add what is for the one
    to the other too; a config that goes on saying so would have the next loading tie them again.
    """
    both = [model.get_input_embeddings(), model.get_output_embeddings()]
    words, head = map(_inner, both)
    if head is not None and head.weight is words.weight and both != [words, head]:
        head.weight = type(head.weight)(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    merged = model.merge_and_unload()
    words, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is not None and head.weight is not words.weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged


def _inner(module: Any) -> Any:
    """The module that PEFT put an adapter around, or that stands there as it was. Rows that train keep a pair tied."""
    if hasattr(module, "token_adapter"):
        return module
    return getattr(module, "base_layer", getattr(module, "original_module", module))
