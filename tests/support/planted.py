"""Files that leave a mark if they are unpickled or run."""

import os
import pickle
from pathlib import Path


class Planted:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch {self.mark!r}",)


def planted_pickle(path, mark):
    path.write_bytes(pickle.dumps(Planted(mark)))


def planted_torch(path, mark):
    """As torch.save writes it."""
    import torch

    torch.save({"weight": Planted(mark)}, path)


def planted_module(path, mark, names):
    """Python code with classes of these names, which leaves the mark when it is imported."""
    classes = "\n".join(f"class {name}: pass" for name in names)
    path.write_text(f"open({str(mark)!r}, 'w').close()\n{classes}\n")


def left_no(mark):
    assert not Path(mark).exists(), "what was planted ran"
