"""From records to the batches that a model trains on; ``vision`` is the collator, the others are its steps.

Labels are the assistant's words and the token that ends its turn, nothing else.
"""
