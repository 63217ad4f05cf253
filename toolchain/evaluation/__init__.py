"""Score zero-shot accuracy and retrieval of any model that encodes images and texts.

The inputs are the entries of a recipe's `evaluate.sets` and a model's `Encoders`.  The outputs are evaluation.json
(documents.py) and the rank of every image, for paired tests.
To add a format of evaluation sets, add a spec to toolchain/recipe/evaluate.py and a function to open_sets.py that
returns an `EvalSet`.  To add a score, add a key to documents.py and compute it in zero_shot.py.
"""
