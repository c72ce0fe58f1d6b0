"""What needs torch and nothing else: the loss in chunks, attention of segments, float8 products, sums over ranks.

Each op stands beside the few naive lines that it replaces.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "linear_cross_entropy": ["weighted_linear_cross_entropy"],
    },
)
