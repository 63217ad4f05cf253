"""Everything that happens on the training machine, from a recipe to its report.

A recipe's sections flow down through the packages, each of which imports only those before it: recipe, data, models,
evaluation, distillation, quantization, report, pipeline.  The modules beside them (errors, filesystem, stage,
distributed, progress, ...) know nothing of models or data; code that leaves this machine belongs in `export`.
"""
