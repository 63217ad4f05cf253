"""Zero-shot accuracy and retrieval of any model that encodes images and texts.

In flow the entries of a recipe's `evaluate.sets` and the `Encoders` of a model; out flow the documents of document.py
(evaluation.json) and the rank of every image, for paired tests.
A new format of evaluation sets is a spec in toolchain/recipe/evaluate.py and a function in open_sets.py that returns
an `EvalSet`; a new score is a key in document.py, computed in zero_shot.py.
"""
