"""Measure how fast and how big exported models are, and how sure that is.

Directories of exported models, an `Effort` and a `Target` (protocol.py) go in; profile.json (documents.py) and every
latency measured come out.  A statistic goes to summary.py with its field in documents.py, a column of the printed
table to table.py, and whatever else is to be timed passes its jobs to interleaved.py.
"""
