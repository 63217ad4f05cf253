"""Read YAML recipes into frozen pydantic models, and report every problem in one at once.

Input: a path and `--set` overrides.  Output: a `Recipe`, resolved and checked, without importing torch.  Add a new
field to the module of its section, and a rule between sections to recipe.py.
"""
