"""The text decoder of a vision-language model, as both passes use it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families.table import Family, decoder_of, family_of


@dataclass(frozen=True)
class TextDecoder:
    """The decoder's module, without a head, and the row of its model's family."""

    module: Any
    family: Family

    @classmethod
    def of(cls, model: Any) -> TextDecoder:
        return cls(decoder_of(model), family_of(model))

    @property
    def attention(self) -> str:
        """The name of the attention implementation: sdpa, eager, flash_attention_2, ..."""
        return str(self.module.config._attn_implementation)

    @property
    def hands_arguments_on(self) -> bool:
        """Whether keyword arguments that the decoder does not know reach its attention."""
        kinds = (parameter.kind for parameter in parameters_of(type(self.module)).values())  # type: ignore[arg-type]
        return inspect.Parameter.VAR_KEYWORD in kinds

    @property
    def queries_per_key(self) -> int:
        """Query heads that share a key."""
        config = self.module.config
        heads = getattr(config, "num_attention_heads", None) or 1
        return heads // (getattr(config, "num_key_value_heads", None) or heads)

    def scales_by_index(self, length: int) -> bool:
        """Whether a row of ``length`` tokens is so long that queries are scaled by their place in it (Llama 4)."""
        config = self.module.config
        return bool(getattr(config, "attn_temperature_tuning", False)) and length >= config.floor_scale

    @property
    def dropout(self) -> float:
        """The largest dropout probability of the decoder, its attention's and its adapters' included."""
        rates = [module.p for module in self.module.modules() if isinstance(module, nn.Dropout)]
        rates += [getattr(self.module.config, name, None) or 0.0 for name in ("attention_dropout", "dropout")]
        return max((float(rate) for rate in rates), default=0.0)


@functools.cache
def parameters_of(module_class: Any) -> dict[str, inspect.Parameter]:
    """Those of the class's own forward, whatever decorates it."""
    return dict(inspect.signature(inspect.unwrap(module_class.forward)).parameters)


@contextmanager
def frequencies_of(module: nn.Module, position_ids: Tensor) -> Iterator[None]:
    """Inside the block rotary embeddings take the frequencies of the whole batch, whichever of its tokens they are given.

    Those of the kinds longrope and dynamic choose them by the largest position that they see: that one comes along.
    """
    largest = position_ids.max()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        more = torch.cat([given, largest.to(given.device).expand(*given.shape[:-1], 1)], -1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": more}
        return (args[0], more, *args[2:]), kwargs

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return tuple(one[..., :-1, :] for one in output) if isinstance(output, tuple) else output[..., :-1, :]

    with contextlib.ExitStack() as stack:
        for part in module.modules():
            if _chooses_frequencies(part):
                stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(after).remove)
        yield


def _chooses_frequencies(module: nn.Module) -> bool:
    kinds = vars(module).get("rope_type")
    named = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in named)


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """The module in eval mode inside the block: dropout would add noise to Δ. Every submodule's own mode comes back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile the decoder's layers, each in place, for any number of tokens. ``options``: of :func:`torch.compile`.

    The rest of a step stays as it is: layouts are made on the host from every batch. The attention of packed rows is not
    compiled either, but what stands around it in a layer is.

    Raises:
        ValueError: a decoder without a list of layers.
    """
    layers = getattr(TextDecoder.of(model).module, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"torch_compile=True: the decoder of {type(model).__name__} has no list of layers. Set it to False."
        )
    for layer in layers:
        layer.compile(**{"dynamic": True, **options})


def keep_four_bits_as_they_are(model: nn.Module) -> bool:
    """Have linear layers in 4 bits (bitsandbytes) leave their weights alone; whether all still are as they were loaded.

    On some CPUs (AVX-512 with bfloat16) their first forward in eval mode without gradients writes the weights anew for a
    kernel of inference: scales rounded to bfloat16, and no gradient afterwards. The pass without the image is one of those.

    Raises:
        ValueError: on the CPU, a layer whose rows are no whole number of blocks: bitsandbytes decodes it wrongly there.
    """
    untouched = True
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None:
            continue
        untouched = untouched and not getattr(state, "packing_format_for_cpu", False)
        if weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise ValueError(
                f"{name}: in 4 bits and {state.shape[-1]} wide, no multiple of {state.blocksize}: bitsandbytes may decode "
                f"such weights wrongly on the CPU. Add {name.rpartition('.')[2]} (and lm_head) to quantization_config's "
                "llm_int8_skip_modules, or use a GPU."
            )
    return untouched
