"""Facts that the whole package shares and that nobody should write twice."""

# Label of a token that is not to be learnt, as torch's cross-entropy and transformers' models read it.
IGNORE_INDEX = -100

# Entries of a batch, beside what the model's own forward takes.
CONTRAST_PREFIX = "contrast_"  # begins the names of inputs for the pass without the image
NO_CONTRAST = f"{CONTRAST_PREFIX}missing"  # [B] bool, rows whose image nothing could be put in the place of
TOKEN_WEIGHTS = "token_weights"  # [B, L], weights that somebody has measured before
LENGTH_COUNTS = "long_records"  # [2], how many records the collator left out, and how many it cut
RECORD_IDS = "record_ids"  # what errors call the records of the batch
QUARANTINED = "quarantined"  # a JSON text for each record that failed while the batch was made

# How files of JSON are opened to be written: half a surrogate pair, which a text may hold, is escaped as JSON does it.
AS_JSON = "backslashreplace"
