"""Read YAML recipes into frozen pydantic models, and report every problem in one at once.

A path and `--set` overrides go in; a `Recipe`, resolved and checked, comes out, without importing torch.  A new field
goes into the module of its section, a rule between sections into recipe.py.
"""
