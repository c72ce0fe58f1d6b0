"""Which modules train, and at which learning rate: the groups of a stage, LoRA, and the check of the first gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..families.dummy_images import feature_sum
from ..families.module_groups import FREEZABLE, GROUPS, group_of, module_groups
from ..families.table import family_of
from ..models.quantised import is_packed, size_of

logger = logging.getLogger(__name__)


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
        if self.alpha < 1:
            raise ValueError(f"lora.alpha={self.alpha}: the adapters' output is multiplied by it. Set 1 or more")
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


def prepare(
    model: Any,
    train: Sequence[str],
    lora: LoraSettings | None = None,
    freeze: Sequence[str] = (),
    *,
    image: Mapping[str, torch.Tensor] | None = None,
) -> Prepared:
    """Freeze all of ``model`` but the groups named in ``train``; with ``lora`` among them, put adapters on it.

    Args:
        model: a transformers vision-language model without adapters.
        train: names out of :data:`GROUPS`.
        lora: settings of the adapters; None: the defaults.
        freeze: what stays frozen inside those groups: ``embeddings``, the language model's word table. Where the lm_head is
            tied to it, that stays too.
        image: the vision arguments of one image, by which parameters of the tower are found that no feature depends on.
            None: the family's dummy image.

    Returns:
        :class:`Prepared`; its model is a PeftModel if ``lora`` is among ``train``, else ``model`` itself.

    Raises:
        ValueError: an unknown group, one that the model does not have, or groups that contradict each other.
    """
    groups = module_groups(model)
    check_groups(model, train, freeze)
    unused: set[str] = set()
    if "vision_tower" in {*train, *(lora.targets if lora and "lora" in train else ())}:
        unused = _unused_in_tower(model, groups, image)
    model.requires_grad_(False)
    if "lora" in train:
        return _with_adapters(model, train, lora or LoraSettings(), groups, unused)
    chosen = {name: group_of(name, groups, train) for name, _ in model.named_parameters()}
    trained = {name: group for name, group in chosen.items() if group and name not in unused}
    if "embeddings" in freeze:
        word_table = model.get_input_embeddings().weight
        trained = {name: group for name, group in trained.items() if model.get_parameter(name) is not word_table}
    _refuse_quantised(trained.items(), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return Prepared(model, trained, tuple(sorted(unused & {name for name, group in chosen.items() if group})))


def check_groups(model: Any, train: Sequence[str], freeze: Sequence[str] = ()) -> None:
    """ValueError unless ``model`` has the groups of ``train``, they can train together, and hold what ``freeze`` names."""
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
                "If one of them is it, add its name to the table in seecal/families/module_groups.py."
            )
    if "lora" in train and (whole := {"language_model", "vision_tower"} & set(train)):
        raise ValueError(
            f"train: lora and {', '.join(sorted(whole))}: adapters go on frozen modules. Take one of the two out; "
            "lora.target says where adapters go."
        )
    check_freeze(train, freeze)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if "lm_head" in train and tied:
        raise ValueError(
            f"train: the lm_head of this {type(model).__name__} is tied to the input embeddings, so it cannot train apart "
            "from them. Name language_model, which holds both."
        )


def check_freeze(train: Sequence[str], freeze: Sequence[str]) -> None:
    """ValueError where ``freeze`` names something unknown, or what does not train anyway."""
    for part in freeze:
        if part not in FREEZABLE:
            raise ValueError(f"freeze: nothing is called {part!r}; there is {', '.join(FREEZABLE)}")
    if freeze and "language_model" not in train:
        raise ValueError(
            f"freeze: {', '.join(freeze)}: with train: {', '.join(train)} they do not train anyway. Take freeze out, or "
            "add language_model to train"
        )


def _unused_in_tower(
    model: Any, groups: Mapping[str, tuple[str, ...]], image: Mapping[str, torch.Tensor] | None
) -> set[str]:
    """Parameters of the vision tower that no image feature depends on, found on one dummy image.

    LLaVA reads the layer before the tower's last, so the last one never has a gradient: DDP would wait for it. A family
    without a dummy image gives an empty set; the check of the first gradients then names them.
    """
    if image is None:
        dummy = family_of(model).dummy_image
        if dummy is None:
            return set()
        image = dummy(model)
    tower = {n: p for n, p in model.named_parameters() if group_of(n, groups, ("vision_tower",)) and not is_packed(p)}
    was_training, needed = model.training, [parameter.requires_grad for parameter in tower.values()]
    model.eval()
    for parameter in tower.values():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        total = feature_sum(model, dict(image))
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
    names = {
        name: group_of(name, groups, [one for one in train if one != "lora"]) for name, _ in model.named_parameters()
    }
    _refuse_quantised([(name, group) for name, group in names.items() if group], model)
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


def _refuse_quantised(trained: Iterable[tuple[str, str]], model: Any) -> None:
    for name, group in trained:
        if is_packed(model.get_parameter(name)):
            raise ValueError(
                f"train: {group}: its {name} is quantised, and such weights do not train. Take {group} out of train and "
                "put lora in, or name its modules and lm_head in quantization_config's llm_int8_skip_modules."
            )


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
        counts.setdefault(prepared.groups.get(name, "frozen"), []).append(size_of(parameter))
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
