"""Train a student against a frozen teacher, live or cached, or alone.

A `Training` (recipe section, models, data) goes into `distill`; an open_clip local-dir, a log and checkpoints come out.
An objective is a function in losses.py, a row of `OBJECTIVES` in objectives.py and a weight in recipe/distill.py.
"""
