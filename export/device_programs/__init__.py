"""Programs that are copied to devices and run there on their own, on Python 3.8 and without clipkd.

Input: command-line arguments and the files that they name.  Output: one JSON document on stdout, messages on stderr,
and an exit status that tells why there is no document.  To add a program, add a file here that imports nothing of
clipkd, its name to PROGRAMS of tests/test_architecture.py, and its document's type to export/devices/documents.py.
"""
