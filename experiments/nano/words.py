"""A tokenizer whose tokens are the words of a task."""

from __future__ import annotations

import re
from collections.abc import Iterable

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

PAD, BOS, END, IMAGE, UNKNOWN = "<pad>", "<bos>", "<eos>", "<image>", "<unk>"
_SPECIAL = (PAD, BOS, END, UNKNOWN, IMAGE)


def words_of(text: str) -> list[str]:
    """Its words and marks in order, as the tokenizer cuts it."""
    return re.findall(r"\w+|[^\w\s]+", text)


def tokenizer_of(texts: Iterable[str], *more: str, begins: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with one token a word.

    Args:
        texts: all that can be asked or answered.
        more: further special tokens.
        begins: it puts ``<bos>`` before a text.
    """
    known = sorted({word for text in texts for word in words_of(text)})
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *more, *known))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=END, unk_token=UNKNOWN
    )
    made.add_special_tokens({"additional_special_tokens": [IMAGE, *more]})
    if begins:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, made.bos_token_id)]
        )
    return made
