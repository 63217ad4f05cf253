"""Train a student against a frozen teacher, live or cached, or without one.

`distill` takes a `Training` (recipe section, models, data) and writes an open_clip local-dir, a log and checkpoints.
An objective is a function in losses.py, a row of `OBJECTIVES` in objectives.py and a weight in recipe/distill.py.
"""
