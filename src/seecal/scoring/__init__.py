"""Scores: Δ, logits and weights of every label token of a data set in Parquet files, and what reads them.

Drawing only, without torch, is not here: numbers come from here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "manifest": ["Manifest", "read_manifest"],
        "reference": ["score_reference"],
        "read": ["RecordScores", "read_scores"],
        "run": ["ScoreReport"],
        "shards": ["Skipped"],
    },
)
