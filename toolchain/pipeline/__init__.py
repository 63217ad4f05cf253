"""Make the stages of a run up to its checkpoints: teacher, teacher cache, baseline, student, int8 student.

Input: a `Recipe` and a run directory.  Output: a `Stage` for each checkpoint, reused if its inputs are unchanged.
Give a new stage a module here that defines its `StageSpec` and imports heavy packages only inside its work, and add it
to `plan.py`, which compares a recipe with a run before anything is made.
"""
