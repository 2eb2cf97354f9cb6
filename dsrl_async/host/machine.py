"""What this process may use of the machine: memory and CPUs, within the limits of its container or batch job."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number above this if there is no limit."""


def control_groups(controller: str, groups: Path | None = None, membership: Path | None = None) -> Iterator[Path]:
    """Yield the directories of the control groups whose limits hold for this process: its own and all above, as far as
    a container lets them be seen, in version 2 and in version 1 (see cgroups(7))."""
    groups, membership = groups or GROUPS, membership or MEMBERSHIP
    text = membership.read_text() if membership.is_file() else ""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root = groups
        elif controller in controllers.split(","):
            root = groups / controller
        else:
            continue
        group = root / path.lstrip("/")
        yield from (place for place in (group, *group.parents) if place.is_dir() and place.is_relative_to(root))


def _number(path: Path) -> int | None:
    """The number in a limit's file; None if there is no such file, or if it says that there is no limit."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() and int(text) < UNLIMITED else None


def available_memory(groups: Path | None = None, membership: Path | None = None) -> int:
    """Bytes that new processes can have: what is left on the machine, or of a control group's limit if that is less."""
    available = int(psutil.virtual_memory().available)
    for group in control_groups("memory", groups, membership):
        for limit_file, used_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and used is not None:
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                available = min(available, limit - used + int(statistics[cache]))  # the kernel gives page cache back
    return available


def available_cpus(groups: Path | None = None, membership: Path | None = None) -> int:
    """Cores that this process may keep busy: those of its affinity, or a control group's quota if less, rounded up."""
    cpus = len(os.sched_getaffinity(0))
    for group in control_groups("cpu", groups, membership):
        quota: int | None
        period: int | None
        if (group / "cpu.max").is_file():
            quota, period = (int(word) if word.isdigit() else None for word in (group / "cpu.max").read_text().split())
        else:
            quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")  # -1: none
        if quota and period:
            cpus = min(cpus, math.ceil(quota / period))
    return cpus


def cpu_threads(wanted: int | None) -> int:
    """Number of threads of a model process: `wanted`, or a quarter of the available cores, but at least one."""
    return wanted or max(1, available_cpus() // 4)
