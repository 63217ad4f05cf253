"""Know the machines that models are measured on, and run programs there over ssh.

A device's name (registry.py) and a program of export/device_programs with its arguments and files go in; the document
that it prints (documents.py) comes out, or an error of this process (ssh.py, run_runner.py).  The next kind of device
is a row in presets.py; a new thing that devices can do is a probe in device_programs/probes.py and a row in doctor.py.
"""
