"""The frozen flow-matching policy: Pi0 and Pi0.5 networks, sampler, checkpoints and processing.

The entry points from Python are `Pi0Config`, `load_model`, `load_policy` and `sample_actions`; see docs/pi0.md. They
are imported at first use, since processes without torch use this package too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsrl_async.pi0.checkpoint import load_model, load_policy
    from dsrl_async.pi0.config import Pi0Config
    from dsrl_async.pi0.sampler import sample_actions

__all__ = ["Pi0Config", "load_model", "load_policy", "sample_actions"]

_MODULES = {
    "Pi0Config": "dsrl_async.pi0.config",
    "load_model": "dsrl_async.pi0.checkpoint",
    "load_policy": "dsrl_async.pi0.checkpoint",
    "sample_actions": "dsrl_async.pi0.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
