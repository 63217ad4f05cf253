"""Score zero-shot accuracy and retrieval of any model that encodes images and texts.

The entries of a recipe's `evaluate.sets` and the `Encoders` of a model go in; evaluation.json (documents.py) and the
rank of every image, for paired tests, come out.
A new format of evaluation sets is a spec in toolchain/recipe/evaluate.py and a function in open_sets.py that returns
an `EvalSet`; a new score is a key in documents.py, computed in zero_shot.py.
"""
