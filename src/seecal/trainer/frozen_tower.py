"""A vision tower that does not train is not run backwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.module_groups import group_of, module_groups
from ..families.table import unwrap


@contextmanager
def forward_only(model: Any) -> Iterator[None]:
    """In here a frozen vision tower gives features without a graph, whatever gradient checkpointing has asked for.

    transformers' ``activation_checkpointing_enable`` makes the outputs of all embeddings of a model require a gradient, the
    vision tower's patches too. A frozen tower is then run once more in each backward pass, and backwards, for a gradient
    that nothing reads: three more of its forward passes a step. What trains gets the same gradients without.

    A tower with a parameter that trains, an adapter's too, is left as it is.
    """
    handles = [one.register_forward_hook(_without_graph) for one in _first_layers(unwrap(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_graph(module: nn.Module, arguments: Any, output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else None


def _first_layers(model: Any) -> list[nn.Module]:
    """What the vision towers begin with, where none of their parameters trains; a projector inside them may."""
    groups = module_groups(model)
    if any(
        parameter.requires_grad and group_of(name, groups, groups) == "vision_tower"
        for name, parameter in model.named_parameters()
    ):
        return []
    found = {}
    for path in groups.get("vision_tower", ()):
        for module in model.get_submodule(path).modules():
            if isinstance(module, PreTrainedModel):
                first = _input_embeddings(module)
                if isinstance(first, nn.Module):
                    found[id(first)] = first
    return list(found.values())


def _input_embeddings(module: PreTrainedModel) -> Any:
    try:
        return module.get_input_embeddings()
    except NotImplementedError:  # how transformers says that there are none: it asks for no gradient there either
        return None
