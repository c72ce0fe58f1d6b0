"""``seecal.build_start``: what training starts from, a language model and a vision tower joined by a new projector."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from . import assembly
from .chat_templates import chat_template_for
from .compared import difference, rounding_of
from .hub_layout import save_in_hub_layout
from .new_folder import new_folder
from .towers import convnext_sizes, convnext_tensors
from .trusted_files import check_config
from .weight_files import folder_of

FAMILIES = ("llava", "llava_next", "mgm", "mgm_hd")
# Tokens of a tower beside its patches: the first one, or none
_STRATEGY = {1: "default", 0: "full"}
# (tiles a side, side of the high-resolution image in pixels for a tower of 336) of Mini-Gemini
_MGM = {"mgm": (1, 768), "mgm_hd": (2, 1536)}
# What configs of language models call that which their classes do to the head's logits, and the classes here do not
_AFTER_HEAD = (
    "final_logit_softcapping", "output_logit_soft_cap", "logits_scaling", "logit_scale", "lm_head_multiplier",
    "output_multiplier",
)  # fmt: skip
_GIVE_ANOTHER = "Give a causal language model such as Llama, Qwen, Mistral, Gemma or Gemma 3."


def build_start(
    family: str,
    language_model: str,
    vision_tower: str,
    out: str | Path,
    *,
    aux_tower: str | None = None,
    images: str = "pad",
    template: str | None = None,
    vision_feature_layer: int = -2,
    seed: int = 0,
    dtype: Any = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Put a model to train together: a causal language model, a vision tower and a new projector.

    The vocabulary gets an image token and, where the language model has none of its own, a padding token, and is padded
    to a multiple of 64 with the mean of its rows. The projector starts as torch initialises it, image_newline at
    N(0, 1)/√D. The parts are loaded once and saved as they are: the memory of one model. Before that, both read a few
    tokens, and their logits must be the same.

    Args:
        family: "llava", "llava_next" (tiles), "mgm" or "mgm_hd" (Mini-Gemini: a second tower for details).
        language_model: folder or hub id of any causal language model of transformers.
        vision_tower: folder or hub id of a vision model of transformers (CLIP, SigLIP, …), or of a model that has one.
        out: the folder to write.
        aux_tower: of Mini-Gemini: folder or hub id of a ConvNeXt, in transformers', timm's or OpenCLIP's files.
        images: "pad" puts the whole image on a square, "square" cuts its middle out. llava_next has tiles.
        template: "vicuna_v1", "gemma", "own" (the language model's, with images put into its texts), or a file; None:
            its own where it has one, else vicuna_v1.
        vision_feature_layer: which layer of the tower the projector reads; −2 is the last but one.
        seed: of the projector's numbers.
        dtype: of the result; "auto": the precision that the language model was saved in.
        max_shard_size: of one file of weights.
        overwrite: whether a model that lies in ``out`` may go.

    Returns:
        The folder.

    Raises:
        ValueError: no such family or template, a part that cannot be loaded, a tower whose tokens are no grid of patches,
            a language model that would compute something else in the model, or files in ``out``.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: {family}: known are {', '.join(FAMILIES)}")
    if images not in ("pad", "square"):
        raise ValueError(f"images: {images}: known are pad and square")
    if (family in _MGM) != (aux_tower is not None):
        raise ValueError(
            f"aux_tower: {aux_tower}: Mini-Gemini ({', '.join(_MGM)}) has a second tower, others have none"
        )
    with new_folder(out, overwrite=overwrite, sources=(language_model, vision_tower, aux_tower)) as part:
        parts = _Parts(language_model, vision_tower, template, dtype, seed)
        if aux_tower is None:
            model, processor = parts.llava("anyres" if family == "llava_next" else images, vision_feature_layer)
        else:
            model, processor = parts.mgm(aux_tower, *_MGM[family], images, vision_feature_layer)
        save_in_hub_layout(model, part, max_shard_size)
        processor.save_pretrained(part)
    return Path(out)


class _Parts:
    """A language model with room for two tokens more, and a tower in its precision."""

    def __init__(self, language_model: str, vision_tower: str, template: str | None, dtype: Any, seed: int) -> None:
        self.names, self.seed = (language_model, vision_tower), seed
        self.tokenizer = assembly.tokenizer_of(language_model)
        assembly.add_tokens(self.tokenizer)
        self.template = chat_template_for(self.tokenizer, template)
        self.tower = load_tower(vision_tower, dtype)
        self.vision = self.tower.config
        check_tower(self.vision, vision_tower)
        self.extra = extra_tokens(self.vision, vision_tower)
        self.text = load_text(language_model, dtype)
        grow_vocabulary(self.text, len(self.tokenizer))
        self.tower.to(self.text.dtype)

    def llava(self, images: str, layer: int) -> tuple[Any, Any]:
        """(model, processor) of a LLaVA; of a LLaVA-NeXT for "anyres"."""
        import transformers as hf

        options, vision = {}, self.vision
        if images == "anyres":
            options["image_grid_pinpoints"] = assembly.grid_pinpoints(vision.image_size)
        make_config: Any = hf.LlavaNextConfig if options else hf.LlavaConfig
        make_model: Any = hf.LlavaNextForConditionalGeneration if options else hf.LlavaForConditionalGeneration
        config = make_config(
            **self._settings(layer),
            image_token_index=self.tokenizer.convert_tokens_to_ids(assembly.PLACEHOLDER),
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
            **options,
        )
        model = self._joined(make_model, config)
        if options:
            newline = assembly.random_newline(config.text_config.hidden_size, self.text.dtype, self.seed)
            model.model.image_newline = torch.nn.Parameter(newline)
        mean, std = colours_of(self.names[1], vision)
        processor = assembly.llava_processor(
            self.tokenizer,
            side=vision.image_size,
            patch=vision.patch_size,
            images=images,
            template=self.template,
            strategy=_STRATEGY[self.extra],
            extra_tokens=self.extra,
            grid=options.get("image_grid_pinpoints"),
            mean=mean,
            std=std,
        )
        return self._whole(model), processor

    def mgm(self, aux_tower: str, grid: int, side: int, images: str, layer: int) -> tuple[Any, Any]:
        """(model, processor) of a Mini-Gemini; of an MGM-HD where ``grid`` is 2.

        Args:
            aux_tower: its ConvNeXt's folder or hub id.
            grid: tiles a side.
            side: of the high-resolution image for a tower that sees 336 pixels; for others in proportion.
            images: "square" or "pad".
            layer: of the tower, which the projector reads.
        """
        from .mgm import MGMConfig, MGMForConditionalGeneration

        state = convnext_tensors(folder_of(aux_tower))
        channels, depths = convnext_sizes(state)
        cell = 4 * grid * (self.vision.image_size // self.vision.patch_size)  # every token has as many cells
        side = max(round(side * self.vision.image_size / 336 / cell), 1) * cell
        config = MGMConfig(
            **self._settings(layer),
            vision_aux_config={"hidden_sizes": channels, "depths": depths, "image_size": side},
            image_token_id=self.tokenizer.convert_tokens_to_ids(assembly.PLACEHOLDER),
            image_grid=grid,
            image_global=grid > 1,
            image_size_aux=side,
        )
        model = self._joined(MGMForConditionalGeneration, config)
        tensors = {name: one.read().to(self.text.dtype) for name, one in state.items()}
        try:
            model.model.vision_tower_aux.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{aux_tower}: no whole ConvNeXt: {' '.join(str(error).split())[:300]}") from None
        return self._whole(model), assembly.mgm_processor(self.tokenizer, config, images=images, template=self.template)

    def _settings(self, layer: int) -> dict[str, Any]:
        """What the configs of all families have."""
        self.text.config.pad_token_id = self.tokenizer.pad_token_id
        return {
            "vision_config": self.vision,
            "text_config": self.text.config,
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": _STRATEGY[self.extra],
            "tie_word_embeddings": self.text.config.tie_word_embeddings,
            "pad_token_id": self.tokenizer.pad_token_id,
            "dtype": self.text.dtype,
        }

    def _joined(self, make_model: Any, config: Any) -> Any:
        """The model, made of the parts, and what is new in it drawn."""
        with torch.device("meta"):  # the big parts come next: no room for a second set of them
            model = make_model(config)
        its_own = set(model.state_dict())
        model.model.language_model, model.lm_head = self.text.base_model, self.text.lm_head
        model.model.vision_tower = self.tower
        torch.manual_seed(self.seed)
        for name in ("multi_modal_projector", "mining"):
            for module in getattr(model.model, name, torch.nn.Module()).modules():
                if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
                    module.to_empty(device="cpu").to(self.text.dtype)
                    module.reset_parameters()
        if odd := sorted(its_own ^ set(model.state_dict())):
            raise ValueError(
                f"{self.names[0]} and {self.names[1]}: {odd[0]} is in one of the parts and not in a {config.model_type}, "
                f"or the other way round, so the model would not load as it is saved. {_GIVE_ANOTHER}"
            )
        model.generation_config = self.text.generation_config
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def _whole(self, model: Any) -> Any:
        left = [name for name, one in (*model.named_parameters(), *model.named_buffers()) if one.device.type == "meta"]
        if left:
            kinds = f"{self.text.config.model_type} and {self.vision.model_type}"
            raise ValueError(f"{left[0]}: no part has it, so {kinds} cannot be joined here.")
        check_same_logits(self.text, model.eval(), self.names[0])
        return model


def load_text(language_model: str, dtype: Any = "auto") -> Any:
    """A causal language model. ValueError in one line where it cannot be loaded, or has no plain head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _loaded(AutoConfig, language_model)
    model = _whole_model(AutoModelForCausalLM, language_model, config, dtype)
    if not isinstance(head := getattr(model, "lm_head", None), torch.nn.Linear):
        raise ValueError(
            f"{language_model}: a {model.config.model_type}, which has no lm_head of its own. {_GIVE_ANOTHER}"
        )
    if head.bias is not None:
        raise ValueError(
            f"{language_model}: a {model.config.model_type}, whose lm_head has a bias, which the head of a vision-language "
            f"model here has no place for. {_GIVE_ANOTHER}"
        )
    return model


def check_same_logits(text: Any, model: Any, name: str) -> None:
    """ValueError unless ``model`` computes from tokens alone the logits of ``text``, the language model that is in it.

    A class for language models may do more than its inner model and head do: scale logits, cap them. The classes for
    vision-language models that are built here have the inner model and the head.
    """
    tokens = torch.arange(8)[None]  # the weights are read once for each: a few seconds for billions of them
    with torch.no_grad():
        own, joined = (one(input_ids=tokens).logits.float() for one in (text, model))
    if torch.equal(own, joined):
        return
    fields = {key: getattr(text.config, key, None) for key in _AFTER_HEAD}
    known = [f"{key}={value}" for key, value in fields.items() if value is not None and value != 1]
    apart = difference(own, joined)
    if not known and apart <= rounding_of(text.dtype):
        return
    why = f"its config has {', '.join(known)}, which" if known else "its class does more than its inner model and head,"
    raise ValueError(
        f"{name}: a {text.config.model_type}, whose logits would be others in the model, by {apart:.1e} of the largest: "
        f"{why} would be lost. {_GIVE_ANOTHER}"
    )


def load_tower(vision_tower: str, dtype: Any = "auto") -> Any:
    """A vision model: the folder's own, or the vision part of what is there. ValueError where there is none."""
    from transformers import AutoConfig, AutoModel

    config = _loaded(AutoConfig, vision_tower)
    return _whole_model(AutoModel, vision_tower, getattr(config, "vision_config", config), dtype)


def _whole_model(kind: Any, name: str, config: Any, dtype: Any) -> Any:
    """The model, every tensor of it from its files. PyTorch's are read too: Vicuna and CLIP have come as nothing else."""
    check_config(config, name, {})
    model, report = _loaded(kind, name, config=config, dtype=dtype, output_loading_info=True)
    if missing := sorted(map(str, report["missing_keys"])):
        raise ValueError(
            f"{name}: lacks {len(missing)} of the model's tensors, {missing[0]} for one, which would start from random "
            "numbers. Copy it again."
        )
    return model


def grow_vocabulary(text: Any, tokens: int) -> None:
    """Room for ``tokens`` tokens in the language model, new rows the mean of its own."""
    before = text.get_input_embeddings().weight.shape[0]
    rows = assembly.padded_rows(before, tokens)
    if rows == before:
        return
    matrices = [text.get_input_embeddings(), text.get_output_embeddings()]
    grown = [
        assembly.pad_rows(one.weight.data, rows) for one in matrices[: 1 if text.config.tie_word_embeddings else 2]
    ]
    text.resize_token_embeddings(rows, mean_resizing=False)
    for module, matrix in zip((text.get_input_embeddings(), text.get_output_embeddings()), grown, strict=False):
        module.weight.data.copy_(matrix)


def check_tower(config: Any, name: str) -> None:
    """ValueError unless the tower sees squares of one size in patches of one size."""
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(config, key, None), int):
            raise ValueError(
                f"{name}: a {config.model_type}, whose {key} is {getattr(config, key, None)}: give a vision tower that "
                "sees squares of one size in square patches, such as CLIP or SigLIP."
            )


def extra_tokens(config: Any, name: str) -> int:
    """Tokens that a tower has beside its patches, 0 or 1, from its shapes alone: nothing is computed."""
    from transformers import AutoModel

    with torch.device("meta"):
        tower = AutoModel.from_config(config).eval()
        pixels = torch.empty(1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        found = tower(pixels.to(tower.dtype), output_hidden_states=True)
    patches = (config.image_size // config.patch_size) ** 2
    extra = found.last_hidden_state.shape[1] - patches if found.last_hidden_state.dim() == 3 else -1
    if extra not in _STRATEGY or not found.hidden_states:
        raise ValueError(
            f"{name}: a {config.model_type}, whose features {tuple(found.last_hidden_state.shape)} are not {patches} "
            "patches with at most one token before them: give a vision tower such as CLIP or SigLIP."
        )
    return extra


def colours_of(vision_tower: str, config: Any) -> tuple[Any, Any]:
    """(mean, std) of the tower's colours: its processor's, else what its family was trained with."""
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(vision_tower, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        found = json.loads(Path(file).read_text("utf8")) if file else {}
    except (OSError, ValueError):
        found = {}
    if "image_mean" in found and "image_std" in found:
        return found["image_mean"], found["image_std"]
    if config.model_type.startswith("siglip"):
        return [0.5] * 3, [0.5] * 3
    if config.model_type == "clip_vision_model":
        return assembly.CLIP_MEAN, assembly.CLIP_STD
    raise ValueError(
        f"{vision_tower}: no preprocessor_config.json, so the mean and spread of its colours are not known. Put the "
        "tower's own there."
    )


def _loaded(kind: Any, name: str, **options: Any) -> Any:
    local = {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}
    try:
        return kind.from_pretrained(name, **local, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, UnpicklingError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: cannot be loaded: {first}") from None
