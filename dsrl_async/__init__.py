"""Asynchronous Diffusion Steering via Reinforcement Learning (DSRL) for flow-matching robot policies.

`load_agent` returns what a run has learned, an `Agent`; the rest of the package is used by its commands. Importing the
package imports nothing else: what is public comes with its first use.
"""

__version__ = "0.2.0"
__all__ = [
    "Agent",
    "load_agent",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.agent"), name)
