"""Read training data: from a recipe's `data` section to batches that are pure functions of (seed, step) on any rank.

Specs of toolchain/recipe/data.py and files on a disk go in; `TrainingData` comes out, whose `Batch` holds images,
captions and which samples were corrupt, and for inspecting and packing the samples as they are stored.
A new kind of data is a spec in toolchain/recipe/data.py with the facts about it, one file here, and its cases in
open.py.
"""
