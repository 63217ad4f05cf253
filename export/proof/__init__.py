"""Parity checks."""
