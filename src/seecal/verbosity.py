"""What is printed: libraries that keep quiet while a command of ours talks."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


def quiet() -> None:
    """Stop the libraries' progress bars and notices; warnings stay errors' business."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("accelerate", "trl", "torch", "huggingface_hub", "seecal"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_training() -> None:
    """No progress bars of single files, no deprecations that only a library's caller can mend."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Swallow what a library prints to stderr although its progress bars are off (transformers' GGUF reader does)."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
