"""Checks what a run needs of this machine, and says what to do about what is missing."""
