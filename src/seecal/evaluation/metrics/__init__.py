"""One file a metric, exactly as lmms-eval 0.7.3 measures it, and the table of all of them (``table.py``)."""
