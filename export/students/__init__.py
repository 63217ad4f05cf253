"""Measure candidate students before any of them is trained, to choose one that is fast enough.

In flow names of architectures and a device; out flow the rows of students.json (documents.py), its picture (chart.py)
and its table (table.py).  The next architecture is a row in candidates.py, and recipes/NAME/open_clip_config.json
unless open_clip has it.
"""
