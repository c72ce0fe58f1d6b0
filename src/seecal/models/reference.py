"""A language model beside the one that trains, frozen, that says how likely each token is by the text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .loading import first_line, load_vlm, refuse_missing, refuse_other_folders
from .trusted_files import check_config, check_weights


def load_reference(model: str, tokenizer: Any, *, dtype: Any = "auto") -> Any:
    """The model in eval mode, without gradients: a causal language model, or a vision-language model.

    Args:
        model: a folder, or a hub id (owner/name). No code of its author is run, no pickle read; a folder is read offline.
        tokenizer: of the model that trains. Ids go from one to the other, so the vocabularies must be the same; more tokens
            that were added to it, such as those that stand for images, are left out of what the reference reads.
        dtype: "auto": the precision it was saved in.

    Raises:
        ValueError: nothing there, no model that reads text, or another tokenizer, naming the first token that differs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as SEEING

    folder = Path(model)
    if not folder.is_dir():
        refuse_missing(model, folder)
    else:
        refuse_other_folders(folder)
        check_weights(folder, {})
    local = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model, **local)
        check_config(config, model, {})
        own = AutoTokenizer.from_pretrained(model, **local)
        check_same_tokens(tokenizer, own, model)
        if type(config) in SEEING:
            network = load_vlm(model, dtype=dtype, processor=False)[0]
        else:
            network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True, **local)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{model}: cannot be loaded as a reference: {first_line(error)}") from None
    return network.eval().requires_grad_(False)


def check_same_tokens(tokenizer: Any, other: Any, name: str) -> None:
    """ValueError unless ``other``, of the reference ``name``, gives the tokens of ``tokenizer`` their ids.

    Tokens that were added to ``tokenizer`` may be missing in ``other``.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    added, used = set(tokenizer.added_tokens_decoder), set(ours.values())
    for token, index in ours.items():
        if theirs.get(token, index if index in added else None) != index:
            is_there = f"is {theirs[token]} there" if token in theirs else "is not there"
            raise ValueError(
                f"{name}: another tokenizer than the model's: {token!r}, id {index}, {is_there}. Take a reference with the "
                "model's own vocabulary, or scores that were measured with it."
            )
    for token, index in theirs.items():
        if token not in ours and index in used:
            raise ValueError(
                f"{name}: another tokenizer than the model's: {token!r}, id {index}, is not in the model's. Take a "
                "reference with the model's own vocabulary, or scores that were measured with it."
            )
