"""``python -m seecal``."""

from .cli.main import main

main()
