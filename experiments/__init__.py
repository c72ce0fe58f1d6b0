"""Experiments: each a YAML with what is expected, written before its results, a script, and rows of what came out.

They import the library, never the reverse.
"""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported with PEFT, it names a kernel that it would like
