"""Training and reporting: from a recipe to checkpoints, and from measurements to a report.

A recipe's sections flow down through the packages, each of which imports only those before it: recipe, data, models,
evaluation, distillation, quantization, report, pipeline.  The modules beside them (errors, filesystem, stage,
distributed, progress, ...) know nothing of models or data; exporting, running and timing models is in `export`.
"""
