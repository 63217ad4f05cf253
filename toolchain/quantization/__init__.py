"""Make a student int8 with NNCF: calibrate, fine-tune with the teacher, keep damaged layers float, freeze for export.

A `Quantization` (recipe section, float student, teacher, data) goes into `quantize_student`; an int8 checkpoint comes
out, which `load_quantized` opens and `freeze` turns into modules that export integers.  A rewrite that helps 8 bits
goes into models/folding.py, everything that touches NNCF into nncf_backend.py.
"""
