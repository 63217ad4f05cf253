"""Quantize a student to int8 with NNCF: calibrate, fine-tune with the teacher, keep the worst layers float, export.

`quantize_student` takes a `Quantization` (recipe section, float student, teacher, data) and writes an int8 checkpoint.
`load_quantized` opens it, and `freeze` turns it into modules that export integers.  Rewrites that help 8 bits belong in
models/folding.py, and all code that touches NNCF in nncf_backend.py.
"""
