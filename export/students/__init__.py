"""Measure candidate students before any of them is trained, to choose one that is fast enough.

Names of architectures and a device go in; the rows of students.json (documents.py), a picture (chart.py) and a table
(table.py) come out.  The next architecture is a row in candidates.py, and recipes/NAME/open_clip_config.json unless
open_clip has it.
"""
