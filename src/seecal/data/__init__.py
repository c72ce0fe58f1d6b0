"""From files to batches: ``sources`` (records of any format), ``images`` (decoded when they are needed), ``collators``.

Data is not trusted: paths stay inside a folder, nothing is fetched, what is malformed is refused by name or counted.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "collators.vision": ["VisionCollator"],
        "sources.formats": ["FORMATS", "Format"],
        "sources.load": ["LoadReport", "load_records"],
        "sources.mixture": ["mix"],
    },
)
