"""Build, load, save and run CLIP models as open_clip local-dirs.

`build_model` and `load_model` return a `ClipModel`: a net with its preprocessing and tokenizer.  Faster, exact ways to
run a tower and equivalent rewrites of towers are modules here; an architecture is an open_clip_config.json in recipes/.
"""
