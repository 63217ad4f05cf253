"""Measure how fast and how big exported models are, and how sure we are of it.

In flow the folders of exported models, an `Effort` and a `Target` (protocol.py); out flow profile.json
(documents.py) and every latency measured.  A statistic goes to summary.py with its field in documents.py, a column of
the printed table to table.py, and whatever else is to be timed passes its jobs to interleaved.py.
"""
