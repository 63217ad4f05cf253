"""Register the machines that models are measured on, and run programs there over ssh.

Input: a device's name (registry.py) and a program of export/device_programs with its arguments and files.  Output: the
document that the program prints (documents.py), or an exception (ssh.py, run_runner.py).  To add a kind of device, add
a row to presets.py; to add a capability, add a probe to device_programs/probes.py and a row to doctor.py.
"""
