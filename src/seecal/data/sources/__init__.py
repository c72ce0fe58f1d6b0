"""Data sets of many formats as one record type: readers (rows) → formats (messages, images) → records (checked).

``load`` is the way in, ``mixture`` makes one set of several.
"""
