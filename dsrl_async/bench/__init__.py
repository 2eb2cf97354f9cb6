"""Measures the parts of a run, and whole runs, beside other ways to do the same."""
