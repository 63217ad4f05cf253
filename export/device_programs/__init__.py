"""Programs that are copied to devices and run there on their own, on Python 3.8 and without clipkd.

In flow the words of a command line and the files that they name; out flows one JSON document on stdout, with messages
on stderr and a status that says why there is none.  The next program is a file here that imports nothing of clipkd,
with its name in PROGRAMS of tests/test_architecture.py and the type of its document in export/devices/documents.py.
"""
