"""Errors, ranks, the run directory and the console."""
