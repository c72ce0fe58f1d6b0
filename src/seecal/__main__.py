"""``python -m seecal``."""

from .cli import main

main()
