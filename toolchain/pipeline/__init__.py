"""Make the stages of a run up to its checkpoints: teacher, teacher cache, baseline, student, int8 student.

A `Recipe` and a run's directory go in; a `Stage` for each checkpoint comes out, reused where nothing it depends on
changed.  A new stage gets a module here that states its `StageSpec` and imports heavy packages only inside its work.
"""
