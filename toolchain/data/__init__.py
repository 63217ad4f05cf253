"""Training data: from a recipe's `data` section to batches that are pure functions of (seed, step), in any process.

In flow specs of toolchain/recipe/data.py and files on a disk; out flow `TrainingData`, whose `Batch` holds images,
captions and which samples were corrupt, and for inspecting and packing the samples as they are stored.
A new data source is a spec in toolchain/recipe/data.py with the facts about it, one file here, and its cases in
open.py.
"""
