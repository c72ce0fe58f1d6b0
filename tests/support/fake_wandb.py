"""A wandb that notes what it is given, and a callback that stands in the place of wandb's own."""

from types import SimpleNamespace

from transformers.integrations import WandbCallback

from seecal.trainer import token_backends


class Recorder(WandbCallback):
    """wandb's callback without wandb: does nothing of its own."""

    def __init__(self): ...

    def on_train_begin(self, *args, **kwargs): ...

    on_train_end = on_log = on_save = on_train_begin


def fake_wandb():
    """What it logged lies in ``logs``: each entry as (its kind, what it was made of)."""
    fake = SimpleNamespace(logs=[])
    fake.Html = lambda html: ("html", html)
    fake.Histogram = lambda values: ("histogram", values)
    fake.Table = lambda columns, data: ("table", columns, data)
    fake.log = fake.logs.append
    return fake


def give(patch, name, fake):
    """As what ``import name`` finds, for the backends alone: whether it is installed is asked of the real one."""
    patch.setattr(token_backends, "importlib", SimpleNamespace(import_module={name: fake}.__getitem__))
