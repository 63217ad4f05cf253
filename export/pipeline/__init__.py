"""Pipeline: the stages after training, each a function of the recipe and of the stages before it.

Checkpoints come in as stages; exported models, engines, measurements, auto.json and the report go out.
Another stage is a module here that makes its `StageSpec`, a line in `run` of clipkd.py, and its directory in
`plan.stage_paths`.
"""
