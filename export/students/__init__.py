"""Measure candidate students before any of them is trained, to choose one that is fast enough.

Input: names of architectures and a device.  Output: the rows of students.json (documents.py), a chart (chart.py) and a
table (table.py).  To add an architecture, add a row to candidates.py, and recipes/NAME/open_clip_config.json unless
open_clip has it.
"""
