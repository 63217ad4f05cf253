"""Report the measurements of runs: rows, their Pareto front, findings, and the model to ship.

Input: measurements, manifests and training logs of runs, and rows measured elsewhere.  Output: report.json, and its
readable forms: tables, a chart, an HTML page.
Add a new field to row.py (`ReportRow` and `FIELDS`) and, to print it, to `columns` in tables.py; a new finding to
findings.py; a new output format to a module of its own that write.py calls.
"""
