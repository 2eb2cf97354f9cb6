"""Why a run ended, as `exit_reason` of its summary says it: `max_decisions`, `interrupted`, `failed: ...`."""

from __future__ import annotations

_FAILED = "failed: "


def failure(sentence: str) -> str:
    """The reason of a run that did not end as asked."""
    return _FAILED + sentence


def has_failed(reason: str) -> bool:
    """Whether a run did not end as asked, by a limit or a signal."""
    return reason.startswith(_FAILED)


def what_failed(reason: str) -> str:
    """The sentence of a `failure`."""
    return reason.removeprefix(_FAILED)


def with_consequence(reason: str, what: str, why: str) -> str:
    """The reason of a run in whose end something else went wrong: the first cause is named first.

    Nothing is said twice: `why` may be the cause already.
    """
    if not has_failed(reason):
        return failure(f"{what} ({reason}): {why}")
    return reason if why in reason else f"{reason}; {what}: {why}"


def without_checkpoint(reason: str, why: str, left: str) -> str:
    """The reason of a run that could not write its last checkpoint, with what is `left` to go on from."""
    return f"{with_consequence(reason, 'no checkpoint was written at the end', why)}; {left}"
