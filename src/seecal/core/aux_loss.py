"""The load-balancing loss of mixture-of-experts decoders, which their own forward adds to the cross-entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .main_pass import MainPass


def wants_router_logits(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether the model's own forward would add the loss to this batch's: by an argument or by its text config."""
    asked = inputs.get("output_router_logits")
    configured = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(configured if asked is None else asked)


def aux_loss_of(model: Any, main: MainPass) -> tuple[Tensor, float] | None:
    """(the loss of the batch, a scalar with gradients; its coefficient), or None where no router's logits came out.

    Over real tokens only: a packed row has no others, and padding is masked.
    """
    logits = getattr(main.outputs, "router_logits", None)
    if not logits:
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # all families share it

    config = model.config.get_text_config()
    mask = None if main.layout is not None else main.batch.valid.long()
    experts = logits[0].shape[-1]  # configs have several names for it
    loss: Any = load_balancing_loss_func(tuple(logits), experts, config.num_experts_per_tok, mask)
    return loss, float(getattr(config, "router_aux_loss_coef", 0.0))
