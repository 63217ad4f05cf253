"""Read training data: from a recipe's `data` section to batches that are pure functions of (seed, step) on any rank.

The package turns the specs of toolchain/recipe/data.py and files on disk into `TrainingData`.  Each `Batch` holds
images, captions and a list of corrupt samples.  Inspection and packing read the samples as they are stored.
To add a kind of data, add a spec with its facts to toolchain/recipe/data.py, one file here, and its cases in open.py.
"""
