"""Models that live in seecal because transformers has no class for them."""
