"""Pipeline: the stages after training, each a function of the recipe and of earlier stages.

The input is checkpoints as stages; the output is exported models, engines, measurements, auto.json and the report.
To add a stage, add a module here that makes its `StageSpec`, a line to `run` in clipkd.py, its directory to
`plan.stage_paths`, and its comparison with a run to `plan_run.plan_run`.
"""
