"""Measure latency, throughput, memory and size of exported models, with confidence intervals.

Input: directories of exported models, an `Effort` and a `Target` (protocol.py).  Output: profile.json (documents.py)
and every measured latency.  Add a statistic to summary.py and its field to documents.py, a column of the printed table
to table.py; to time something else, pass jobs to interleaved.py.
"""
