"""Which modules train, and at which learning rate: the groups of a stage, LoRA, and the check of the first gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .blank import feature_sum
from .families import check_vlm, decoder_of, family_of

logger = logging.getLogger(__name__)

GROUPS = ("projector", "language_model", "vision_tower", "lm_head", "lora")

# Where transformers' models keep them: attributes of the base model, or of the whole one. A new name is one entry.
_PROJECTORS = (
    "multi_modal_projector",  # LLaVA and most others
    "image_newline",  # LLaVA-NeXT, -OneVision: a single vector, learned with the projector
    "connector",  # Idefics 3, SmolVLM
    "visual.merger",  # Qwen-VL
    "visual.deepstack_merger_list",
    "aligner",  # Janus
    "embed_vision",  # Gemma 4
    "vision_projection",  # LightOnOCR
    "visual_embeddings_table",  # Ovis 2
    "layerwise_projectors",  # Granite 4 Vision
    "spatial_projectors",
)
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "vision_embed_tokens")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on linear layers.

    Args:
        r: rank.
        alpha: the adapters' output is multiplied by alpha / r.
        dropout: on the adapters' input. Δ compares the training pass with a pass without dropout, so it adds noise to Δ.
        target: groups whose linear layers get adapters: language_model, vision_tower. Never the lm_head.

    Raises:
        ValueError: a value out of range.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target: str | Sequence[str] = "language_model"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r={self.r}: the rank must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout}: expected 0 or more, and less than 1")
        if wrong := [one for one in self.targets if one not in ("language_model", "vision_tower")]:
            raise ValueError(
                f"lora.target={', '.join(wrong)}: adapters go on language_model, vision_tower or both. To train the "
                "projector or the lm_head, name it under train: it is then trained whole and saved with the adapter."
            )

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else tuple(self.target)


@dataclass
class Prepared:
    """A model ready for a stage, and the group of each of its trainable parameters by name."""

    model: Any
    groups: dict[str, str]
    unused: tuple[str, ...] = ()  # of a group that trains, but nothing that is computed depends on them


def module_groups(model: Any) -> dict[str, tuple[str, ...]]:
    """Group → the modules and parameters that make it up, as names in ``model`` (without PEFT's wrapper).

    ``language_model`` holds the lm_head too, as in the paper's code; ``lm_head`` is there to train it alone, or at a
    learning rate of its own. Groups that the model does not have are left out.
    """
    check_vlm(model)
    names = {id(module): name for name, module in model.named_modules()}
    base = names[id(model.base_model)]
    head = names[id(model.get_output_embeddings())]
    groups = {
        "projector": _existing(model, base, _PROJECTORS),
        "language_model": (names[id(decoder_of(model))], head),
        "vision_tower": _existing(model, base, _TOWERS),
        "lm_head": (head,),
    }
    return {group: paths for group, paths in groups.items() if paths}


def _existing(model: Any, base: str, attributes: Iterable[str]) -> tuple[str, ...]:
    found = []
    for path in (prefix + one for one in attributes for prefix in (f"{base}.", "")):
        value = model
        for part in path.split("."):
            value = getattr(value, part, None)
        if isinstance(value, (nn.Module, nn.Parameter)):
            found.append(path)
    return tuple(found)


def group_of(name: str, groups: Mapping[str, tuple[str, ...]], wanted: Iterable[str]) -> str | None:
    """The group of ``wanted`` that owns a parameter: the one with the longest path above it (visual.merger, not visual).

    A group that is not wanted still owns its own, so that training ``visual`` leaves ``visual.merger`` alone.
    """
    owners = [
        (len(path), group in wanted, group)
        for group, paths in groups.items()
        for path in paths
        if name == path or name.startswith(path + ".")
    ]
    # lm_head is in two groups under one path: the one that is wanted owns it, lm_head before language_model
    longest = [owner for owner in owners if owner[0] == max(length for length, _, _ in owners)]
    chosen = max(longest, key=lambda owner: (owner[1], owner[2] == "lm_head"), default=None)
    return chosen[2] if chosen and chosen[1] else None


def prepare(model: Any, train: Sequence[str], lora: LoraSettings | None = None) -> Prepared:
    """Freeze all of ``model`` but the groups named in ``train``; with ``lora`` among them, put adapters on it.

    Args:
        model: a transformers vision-language model without adapters.
        train: names out of :data:`GROUPS`.
        lora: settings of the adapters; None: the defaults.

    Returns:
        :class:`Prepared`; its model is a PeftModel if ``lora`` is among ``train``, else ``model`` itself.

    Raises:
        ValueError: an unknown group, one that the model does not have, or groups that contradict each other.
    """
    groups = module_groups(model)
    check_groups(model, train)
    unused: set[str] = set()
    if "vision_tower" in {*train, *(lora.targets if lora and "lora" in train else ())}:
        unused = _unused_in_tower(model, groups)
    model.requires_grad_(False)
    if "lora" in train:
        return _with_adapters(model, train, lora or LoraSettings(), groups, unused)
    chosen = {name: group_of(name, groups, train) for name, _ in model.named_parameters()}
    trained = {name: group for name, group in chosen.items() if group and name not in unused}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return Prepared(model, trained, tuple(sorted(unused & {name for name, group in chosen.items() if group})))


def check_groups(model: Any, train: Sequence[str]) -> None:
    """ValueError unless ``model`` has the groups of ``train`` and they can train together."""
    groups = module_groups(model)
    if not train:
        raise ValueError(f"train is empty: name what trains, out of {', '.join(GROUPS)}")
    if hasattr(model, "peft_config"):
        raise ValueError("the model already carries adapters: merge them first (model.merge_and_unload())")
    for one in train:
        if one not in GROUPS:
            raise ValueError(f"train: no group is called {one!r}; there are {', '.join(GROUPS)}")
        if one != "lora" and one not in groups:
            tops = sorted({name for root in (model, model.base_model) for name, _ in root.named_children()})
            raise ValueError(
                f"train: {type(model).__name__} has no {one} that seecal knows; its top modules are {', '.join(tops)}. "
                "If one of them is it, add its name to the table in seecal/stages.py."
            )
    if "lora" in train and (whole := {"language_model", "vision_tower"} & set(train)):
        raise ValueError(
            f"train: lora and {', '.join(sorted(whole))}: adapters go on frozen modules. Take one of the two out; "
            "lora.target says where adapters go."
        )
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if "lm_head" in train and tied:
        raise ValueError(
            f"train: the lm_head of this {type(model).__name__} is tied to the input embeddings, so it cannot train apart "
            "from them. Name language_model, which holds both."
        )


def _unused_in_tower(model: Any, groups: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Parameters of the vision tower that no image feature depends on, found on one blank image.

    LLaVA reads the layer before the tower's last, so the last one never has a gradient: DDP would wait for it. A family
    without a blank image gives an empty set; the check of the first gradients then names them.
    """
    blank = family_of(model).blank
    if blank is None:
        return set()
    tower = {n: p for n, p in model.named_parameters() if group_of(n, groups, ("vision_tower",))}
    was_training, needed = model.training, [parameter.requires_grad for parameter in tower.values()]
    model.eval()
    for parameter in tower.values():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        total = feature_sum(model, blank(model))
        gradients = torch.autograd.grad(total, list(tower.values()), allow_unused=True)
    for parameter, before in zip(tower.values(), needed, strict=True):
        parameter.requires_grad_(before)
    model.train(was_training)
    return {name for name, gradient in zip(tower, gradients, strict=True) if gradient is None}


def _with_adapters(
    model: Any, train: Sequence[str], lora: LoraSettings, groups: Mapping[str, tuple[str, ...]], unused: set[str]
) -> Prepared:
    from peft import LoraConfig, get_peft_model
    from peft.utils import ModulesToSaveWrapper

    modules = dict(model.named_modules())
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and group_of(name, groups, lora.targets)
        and module is not model.get_output_embeddings()
        and f"{name}.weight" not in unused
    ]
    whole = [path for group in train if group != "lora" for path in groups[group]]
    if loose := [path for path in whole if path not in modules]:
        # PEFT saves whole modules only. Trained but not saved would be worse than not trained.
        logger.warning("%s: not a module, so PEFT cannot save it beside an adapter: it stays frozen", ", ".join(loose))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=linear,
        modules_to_save=_savable(modules, [path for path in whole if path in modules]) or None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    saved = [name for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    trained = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            copy = next((one for one in saved if name.startswith(one + ".")), None)
            group = group_of(copy.removeprefix("base_model.model."), groups, train) if copy else "lora"
            assert group is not None
            trained[name] = group
    return Prepared(adapted, trained, tuple(sorted(name for name in unused if "vision_tower" in lora.targets)))


def _savable(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[str]:
    """PEFT wraps what has a forward: of a list of modules its members."""
    found = []
    for path in paths:
        members = modules[path].named_children() if isinstance(modules[path], nn.ModuleList) else ()
        found += [f"{path}.{name}" for name, _ in members] or [path]
    return found


def trainable_tree(prepared: Prepared, learning_rate: float, rates: Mapping[str, float] | None = None) -> str:
    """A line for each group: its name, parameters and learning rate; then what is frozen."""
    counts: dict[str, list[int]] = {}
    for name, parameter in prepared.model.named_parameters():
        counts.setdefault(prepared.groups.get(name, "frozen"), []).append(parameter.numel())
    lines = []
    for group in (*GROUPS, "frozen"):
        if group in counts:
            total, tensors = sum(counts[group]), len(counts[group])
            rate = "" if group == "frozen" else f"  learning rate {(rates or {}).get(group, learning_rate):g}"
            lines.append(f"  {group:<15}{total:>15,} parameters in {tensors:>4} tensors{rate}")
    if prepared.unused:
        lines.append(
            f"  ({len(prepared.unused)} tensors of the vision tower stay frozen: no image feature depends on them, "
            f"{prepared.unused[0]} for one)"
        )
    return "\n".join(lines)


def split_by_learning_rate(
    optimizer: Any, model: nn.Module, groups: Mapping[str, str], rates: Mapping[str, float]
) -> None:
    """Give the parameters of the groups in ``rates`` optimizer groups of their own, at that learning rate.

    Args:
        optimizer: a torch optimizer that has made no step; its weight decay and other settings stay.
        model: whose ``named_parameters`` the optimizer holds.
        groups: parameter name → group, of the trainable parameters (``Prepared.groups``).
        rates: group → learning rate.

    Raises:
        ValueError: a rate for a group that does not train, or an optimizer without parameter groups.
    """
    if missing := sorted(set(rates) - set(groups.values())):
        trained = ", ".join(dict.fromkeys(groups.values()))
        raise ValueError(f"learning_rates: {', '.join(missing)} does not train here; what trains is {trained}")
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(
            f"learning_rates with {type(optimizer).__name__}: DeepSpeed makes the optimizer from its own file. Take the "
            "optimizer out of the DeepSpeed config."
        )
    rate_of = {id(p): rates.get(groups.get(_bare_name(n), "")) for n, p in model.named_parameters()}
    split = []
    for one in optimizer.param_groups:
        wanted = sorted({rate_of.get(id(p)) for p in one["params"]}, key=lambda rate: (rate is not None, rate))
        for rate in wanted:
            members = [parameter for parameter in one["params"] if rate_of.get(id(parameter)) == rate]
            split.append({**one, "params": members, **({} if rate is None else {"lr": rate})})
    # Trainer logs the first group's rate: the recipe's own comes first.
    optimizer.param_groups[:] = sorted(split, key=lambda one: one["lr"] in rates.values())


# What DDP, FSDP and activation checkpointing put into parameter names
_WRAPPERS = {"module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def _bare_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class GradientCheck(TrainerCallback):
    """After the first step with an image: every trainable tensor has a gradient and no frozen one has.

    What is silently left out of training (a projector behind a wrong LoRA setting, say) is found before the second step.

    Raises:
        ValueError: from ``train()``, naming tensors on the wrong side.
    """

    def __init__(self) -> None:
        self._images = self._done = self._stepped = False
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
            given = any(name.startswith("pixel_values") and value is not None for name, value in inputs.items())
            self._images = self._images or given

        # DeepSpeed keeps gradients in buffers of its own, .grad is empty
        self._done = args.deepspeed_plugin is not None
        self._hook = model.register_forward_pre_hook(note, with_kwargs=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._stepped = True
        if self._done or not self._images:
            return
        self._done = True
        named = list(model.named_parameters())
        without = [name for name, one in named if one.requires_grad and one.grad is None]
        frozen = [name for name, one in named if not one.requires_grad and one.grad is not None]
        for names, what in ((without, "trainable tensors got no gradient"), (frozen, "frozen tensors got a gradient")):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(
                    f"step {state.global_step + 1}: {len(names)} {what}: {', '.join(names[:3])}{more}. The loss does not "
                    "reach them as `train` says it should. Change train, or set check_gradients: false to go on."
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self._stepped and not self._done:
            logger.warning("no step had an image: the projector has not been trained, and gradients were not checked")
