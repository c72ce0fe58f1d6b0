"""Experiments: each a YAML with what is expected, written before its results, a script, and rows of what came out.

They import the library, never the reverse.
"""
