"""What the collators can be told about records that are long, and about how images are decoded."""

ON_LONG = ("error", "drop", "truncate")
