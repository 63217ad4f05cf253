"""Programs that are copied to devices and run there on their own, on Python 3.8 and without clipkd.

Command-line arguments and the files that they name go in; one JSON document comes out on stdout, messages on stderr,
and an exit status that says why there is no document.  The next program is a file here that imports nothing of clipkd,
with its name in PROGRAMS of tests/test_architecture.py and the type of its document in export/devices/documents.py.
"""
