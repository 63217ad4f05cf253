"""Build, load, save and run CLIP models as open_clip local-dirs.

A `ModelSpec` or a folder goes in; a `ClipModel`, which is a net with its preprocessing and tokenizer, comes out.  An
exact but faster way to run a tower, or an equivalent rewrite of one, gets a module here; an architecture is an
open_clip_config.json in recipes/.
"""
