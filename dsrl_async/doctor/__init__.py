"""Checks what a run needs of a machine, one line each; `python -m dsrl_async.doctor`."""
