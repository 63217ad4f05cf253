"""Report what runs measured: rows, the Pareto front among them, findings, and the model to ship.

Measurements, manifests and training logs of runs go in, and rows measured elsewhere; report.json comes out, which
others read, and its readable forms: tables, a picture, a page.
The next column goes into row.py (`ReportRow` and `FIELDS`) and, to be printed, into `columns` of tables.py; the next
finding into findings.py; the next output format into a module of its own that write.py calls.
"""
