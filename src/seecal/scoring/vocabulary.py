"""The words of a vocabulary, and those whose embeddings point the same way as a feature. V words, P features, D width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What byte-level and SentencePiece vocabularies write for the blank in front of a word
_BEGINS = ("Ġ", "▁")
_AT_ONCE = 16384  # words compared in one go: 256 MiB of float32 embeddings 4096 wide
_SPARE = 4  # how many times as many are looked at, because the same word may stand there in several spellings


@dataclass
class Words:
    """The words of a model's vocabulary, beside its input embeddings.

    Attributes:
        ids: [V] int64, where they stand in the table.
        texts: what each says, without blanks.
        table: [_, D] the input embeddings.
    """

    ids: Tensor
    texts: list[str]
    table: Tensor

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Words:
        """The tokens that are words: letters only, two at least, at the beginning of a word where the vocabulary marks
        that; or one letter of a script without capitals and small letters, as Chinese. Special and added tokens are none.

        Raises:
            ValueError: no such token.
        """
        table = model.get_input_embeddings().weight.detach()
        left_out = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        names = {index: name for name, index in tokenizer.get_vocab().items() if index < len(table)}
        marked = any(name.startswith(_BEGINS) for index, name in names.items() if index not in left_out)
        found = []
        for index in sorted(names.keys() - left_out):
            text = tokenizer.decode([index]).strip()
            if _is_word(text) and (not marked or names[index].startswith(_BEGINS) or not _has_case(text)):
                found.append((index, text))
        if not found:
            raise ValueError(f"{type(tokenizer).__name__}: none of its {len(names)} tokens is a word of letters.")
        return cls(torch.tensor([index for index, _ in found]), [text for _, text in found], table)

    def nearest(self, features: Tensor, count: int = 5) -> list[list[tuple[str, float]]]:
        """For each of ``features`` [P, D] the ``count`` nearest words and their cosine, the nearest first. Spellings of one
        word that differ in capitals count once."""
        features = torch.nn.functional.normalize(features.float(), dim=-1)
        most = min(count * _SPARE, len(self.texts))
        best, where = features.new_empty(len(features), 0), torch.empty(len(features), 0, dtype=torch.long)
        for begin in range(0, len(self.ids), _AT_ONCE):
            ids = self.ids[begin : begin + _AT_ONCE].to(self.table.device)
            words = torch.nn.functional.normalize(self.table[ids].float(), dim=-1)
            cosine, index = (features @ words.T.to(features.device)).topk(min(most, len(ids)), dim=-1)
            best, where = torch.cat([best, cosine], -1), torch.cat([where, index.cpu() + begin], -1)
            best, order = best.topk(min(most, best.shape[-1]), dim=-1)
            where = where.gather(-1, order.cpu())
        found = zip(best.tolist(), where.tolist(), strict=True)
        return [self._distinct(cosines, places, count) for cosines, places in found]

    def _distinct(self, cosines: list[float], places: list[int], count: int) -> list[tuple[str, float]]:
        kept: dict[str, tuple[str, float]] = {}
        for cosine, place in zip(cosines, places, strict=True):
            kept.setdefault(self.texts[place].casefold(), (self.texts[place], cosine))
        return list(kept.values())[:count]


def _is_word(text: str) -> bool:
    return text.isalpha() and (len(text) > 1 or not _has_case(text))


def _has_case(text: str) -> bool:
    return text.lower() != text.upper()
