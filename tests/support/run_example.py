"""Run a script of examples/ in this process: a new one would spend most of its time on imports."""

import runpy
import sys
from unittest import mock

from tests.support.paths import EXAMPLES


def run_example(name, *arguments):
    """``python examples/NAME ARGUMENTS``."""
    script = str(EXAMPLES / name)
    with (
        mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]),
    ):
        runpy.run_path(script, run_name="__main__")
