"""CAL itself: the weighting (``weighting``, read first), and how both passes run inside the model's forward (``forward``).

Nothing here knows TRL or data sets; any training loop can use it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "contrasts": ["CONTRASTS", "Contrast"],
        "enable": ["disable_cal", "enable_cal", "visual_delta"],
        "options": ["CALOptions"],
        "outputs": ["CALOutput", "VisualDelta"],
        "weighting": ["WEIGHTINGS", "Weighting", "token_weights"],
    },
)
