"""Report what runs measured: rows, the Pareto front among them, what they show, and the model to ship.

In flow the measurements, manifests and training logs of runs, and rows measured elsewhere; out flow report.json, which
others read, and its readable forms: tables, a picture, a page.
The next column goes into row.py (`ReportRow` and `FIELDS`) and, to be printed, into `columns` of tables.py; the next
finding into findings.py; the next output format into a module of its own that write.py calls.
"""
