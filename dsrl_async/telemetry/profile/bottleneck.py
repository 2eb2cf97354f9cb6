"""Says in one sentence what limits the throughput of a run and what to change, from where its processes' time goes.

`diagnose` is a pure function. It treats the run as a closed loop of stations: a station that is nearly always busy
holds up the others, which wait for it. If there is none, either the cores are used up or the processes take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple

from dsrl_async.config.settings import Config, PolicyConfig
from dsrl_async.host.environments import environment_record
from dsrl_async.host.machine import cpu_threads
from dsrl_async.telemetry.profile.hardware import Gpu

SATURATED = 0.75
"""A process that is busy for at least this share of its time holds up the others."""
CONTENDED = 1 / 3
"""If a process waits for a core for at least this share of its busy time, the cores are the bottleneck."""
CORES_FULL = 0.9
"""From this share on, the cores count as used up."""
STARVED = 0.5
"""A process that waits for a core for at least this share of its time is held up by those that have the cores."""
NOTICEABLE = 0.25
"""From this share on, a wait is worth naming."""
FEWEST_DECISIONS, FEWEST_SECONDS = 20, 1.0
"""Less than this is too little for a diagnosis."""

ALL_SETTINGS = frozenset(PolicyConfig.model_fields)
"""The keys of `policy`."""

WORK = {
    ("actor", "physics"): "physics",
    ("actor", "render"): "rendering",
    ("actor", "reset"): "resetting episodes",
    ("actor", "replay_write"): "writing transitions",
    ("inference", "gather"): "gathering observations",
    ("inference", "host_to_device"): "copying observations to the GPU",
    ("inference", "prefix"): "encoding images and prompts",
    ("inference", "denoise"): "denoising",
    ("inference", "device_to_host"): "copying actions from the GPU",
    ("inference", "compute"): "starting the policy's kernels",
    ("inference", "scatter"): "handing out actions",
    ("inference", "weights"): "taking in new weights",
    ("learner", "sample"): "drawing batches",
    ("learner", "update"): "gradient updates",
    ("learner", "publish"): "publishing weights",
    ("learner", "checkpoint"): "writing checkpoints",
}
"""What a kind of process does in a phase or stage."""
SERIAL = "serial"
"""The kind of the only process of a `--serial` run."""
OWNERS = {"actor": "the workers'", "inference": "the inference process's", "learner": "the learner's"}


@dataclass(frozen=True)
class ProcessProfile:
    """What the processes of one kind did."""

    count: int
    phases: dict[str, float]
    """Phase or stage -> mean share of a process's time. The names of waits begin with `wait_`."""
    cores: float
    """CPU seconds per second of all processes and threads."""
    queued: float
    """Mean share of time for which a process was ready to run and had no core."""
    memory_mb: float
    """Private memory of one process."""

    @property
    def busy(self) -> float:
        return min(1.0, sum(share for name, share in self.phases.items() if not name.startswith("wait_")))

    @property
    def largest(self) -> str:
        """The phase that takes the most time, waits excluded."""
        work = {name: share for name, share in self.phases.items() if not name.startswith("wait_")}
        return max(work, key=work.__getitem__)


@dataclass(frozen=True)
class RunProfile:
    """What happened during a stretch of a run."""

    seconds: float
    warmed_up: bool
    """Whether the stretch begins after the warm-up, so that the learner learns."""
    decisions: int
    env_steps: int
    updates: int
    batch_size: float
    batch_fill: float
    queue_wait_ms: float
    processes: dict[str, ProcessProfile]
    """actor, inference, learner, supervisor. A serial run has `serial` instead of the last, with all CPU time."""
    core_shares: tuple[float, ...]
    """Busy share of each core that the run may use, whoever used it."""
    cpus: int
    """Number of cores that the run may keep busy. A quota makes it smaller than the number it may use."""
    on_gpu: dict[str, bool]
    """inference, learner -> whether it computes on a GPU."""
    gpus: tuple[Gpu, ...]
    uploads: str
    """How observations get to a GPU: the name of one of `shm.counters.Uploads`, in small letters."""

    @property
    def system_processes(self) -> dict[str, ProcessProfile]:
        """The operating system's processes: a serial run has only one, which does all the work."""
        return {SERIAL: self.processes[SERIAL]} if SERIAL in self.processes else self.processes

    @property
    def cores(self) -> float:
        """Mean number of cores that the run kept busy."""
        return sum(process.cores for process in self.processes.values())

    @property
    def cores_of_others(self) -> float:
        """Mean number of cores that other programs kept busy."""
        return max(0.0, sum(self.core_shares) - self.cores)

    @property
    def free_cores(self) -> float:
        """Mean number of idle cores that the run may use as well."""
        return max(0.0, min(self.cpus - self.cores, len(self.core_shares) - self.cores - self.cores_of_others))


class Glance(NamedTuple):
    who: str
    """`CPU`, `workers`, `inference` or `learner`."""
    busy: float
    """Its busy share."""
    why: str


class Diagnosis(NamedTuple):
    process: str
    """The bottleneck: actor, inference or learner; `cpu` or `other_programs`; `turns` if no process is always busy;
    `nothing` before there is enough data."""
    phase: str
    """The phase that takes most of its time; for `cpu`, the one with the most CPU time, as `kind/phase`."""
    setting: str
    """The configuration key to change, or an empty string."""
    sentence: str


def at_a_glance(
    phases: Mapping[str, Mapping[str, float]], cpu_percent: Mapping[str, float], cpus: int, serial: bool
) -> Glance | None:
    """What seems to hold a run up, by what is known of it without `profile`.

    `phases` are shares of time by kind of process, as in `Activity`; `cpu_percent` is by kind, in percent of one core.
    None if nobody is always busy: the processes take turns.
    """
    used = sum(cpu_percent.values()) / 100
    if used >= CORES_FULL * cpus and not serial:
        return Glance("CPU", min(1.0, used / cpus), f"{used:.1f} of {cpus} cores are busy")
    work = {
        (kind, name): share
        for kind in OWNERS
        for name, share in phases.get(kind, {}).items()
        if not name.startswith("wait_")
    }
    busy = {kind: min(1.0, sum(share for (of, _), share in work.items() if of == kind)) for kind in OWNERS}
    busiest = max(busy, key=busy.__getitem__)
    if busy[busiest] < SATURATED and not serial:
        return None
    phase = max((one for one in work if one[0] == busiest), key=work.__getitem__)
    name, owner = ("workers", "their") if busiest == "actor" else (busiest, "its")
    doing = "the policy" if phase == ("inference", "compute") else WORK[phase]  # here it is not divided into stages
    return Glance(name, busy[busiest], f"{doing}, {work[phase]:.0%} of {'the' if serial else owner} time")


def diagnose(profile: RunProfile, config: Config, policy_settings: Set[str] = ALL_SETTINGS) -> Diagnosis:
    """Find what limits the run's throughput.

    `policy_settings` are the keys of `policy` that the run's own policy reads (`PolicyRecord.own_settings`).
    """
    kinds = {kind: profile.processes[kind] for kind in OWNERS}
    starved = max(kinds, key=lambda kind: kinds[kind].queued)
    if profile.decisions < FEWEST_DECISIONS or profile.seconds < FEWEST_SECONDS:
        others_have_cores = profile.cores_of_others > profile.cores and kinds[starved].queued >= STARVED
        if profile.seconds >= FEWEST_SECONDS and others_have_cores:  # which is why there are so few decisions
            return _of_cpu(starved, profile, config, policy_settings)
        few = f"only {profile.decisions} decisions in {profile.seconds:.1f} s were seen"
        return Diagnosis("nothing", "", "", f"It is too early to name a bottleneck: {few}.")
    busiest = max(kinds, key=lambda kind: kinds[kind].busy)
    busy, queued = kinds[busiest].busy, kinds[busiest].queued
    if config.serial:  # one process does everything, so the largest phase limits it
        busiest = max(kinds, key=lambda kind: kinds[kind].phases[kinds[kind].largest])
        return _of_stage(busiest, profile, config, policy_settings)
    if busy >= SATURATED:
        of_work = _of_cpu if queued >= CONTENDED * busy else _of_stage
        return of_work(busiest, profile, config, policy_settings)
    # Busy cores alone prove nothing: programs of a lower priority give way to the run.
    if profile.free_cores < (1 - CORES_FULL) * profile.cpus and kinds[starved].queued >= NOTICEABLE:
        return _of_cpu(starved, profile, config, policy_settings)
    waits = kinds["inference"].phases
    if waits.get("wait_learner", 0.0) >= NOTICEABLE:
        return _of_stage("learner", profile, config, policy_settings)
    if (share := waits.get("wait_batch", 0.0)) >= NOTICEABLE:
        advice = f"lower inference.batch_wait_ms ({_batch_wait(config)})"
        wait = f"the wait for fuller batches, {share:.0%} of the inference process's time"
        sentence = f"The bottleneck is {wait}; {advice}."
        return Diagnosis("inference", "wait_batch", "inference.batch_wait_ms", sentence)
    waiting = kinds["actor"].phases.get("wait_action", 0.0)
    setting, advice = _more_actors(profile, config)
    sentence = (
        f"Nothing is busy all the time: the workers wait for {waiting:.0%} of their time and the inference process is "
        f"busy for {kinds['inference'].busy:.0%} of its time, in turn; {advice}."
    )
    return Diagnosis("turns", "wait_action", setting, sentence)


def _of_stage(kind: str, profile: RunProfile, config: Config, policy_settings: Set[str]) -> Diagnosis:
    """Diagnosis when the work of a kind of process is the bottleneck."""
    process = profile.processes[kind]
    phase = process.largest
    setting, advice = _advice(kind, phase, profile, config, policy_settings)
    owner = "the run's" if config.serial else OWNERS[kind]
    sentence = f"The bottleneck is {WORK[kind, phase]}, {process.phases[phase]:.0%} of {owner} time; {advice}."
    return Diagnosis(kind, phase, setting, sentence)


def _of_cpu(waiting: str, profile: RunProfile, config: Config, policy_settings: Set[str]) -> Diagnosis:
    """Diagnosis when the cores are the bottleneck; `waiting` is the kind of process that waits for them longest."""
    others, queued = profile.cores_of_others, profile.processes[waiting].queued
    waits = f"{OWNERS[waiting]} work waits for a core {queued:.0%} of the time"
    if others > profile.cores and profile.cores < CORES_FULL * profile.cpus:  # else its quota holds it back
        sentence = (
            f"The bottleneck is other programs, which use {others:.1f} of {len(profile.core_shares)} cores while "
            f"the run gets {profile.cores:.1f}: {waits}; end them, or run elsewhere."
        )
        return Diagnosis("other_programs", "", "", sentence)
    user = max(OWNERS, key=lambda kind: profile.processes[kind].cores)
    process = profile.processes[user]
    setting, advice = _advice(user, process.largest, profile, config, policy_settings)
    work = f"{OWNERS[user]} work ({process.cores:.1f} cores), above all {WORK[user, process.largest]}"
    sentence = (
        f"The bottleneck is the CPU: the run uses {profile.cores:.1f} of {profile.cpus} cores, {waits}, and most of "
        f"it goes to {work}; {advice}."
    )
    return Diagnosis("cpu", f"{user}/{process.largest}", setting, sentence)


def _advice(kind: str, phase: str, profile: RunProfile, config: Config, policy_settings: Set[str]) -> tuple[str, str]:
    """The setting to change when a phase is the bottleneck, and what to do with it in words."""
    on_cpu = not profile.on_gpu.get(kind, False)
    spare = on_cpu and profile.free_cores >= 1
    if kind == "actor":
        own_settings = environment_record(config.env.model_dump()).own_settings
        if phase == "render" and "render_quality" in own_settings and config.env.render_quality == "exact":
            return "env.render_quality", "set env.render_quality to fast, with a policy trained on such images"
        return _more_actors(profile, config)
    if phase in ("publish", "weights"):
        return "learner.publish_interval", f"raise learner.publish_interval (now {config.learner.publish_interval})"
    if phase == "checkpoint":
        interval = config.checkpoint.interval_minutes
        return "checkpoint.interval_minutes", f"raise checkpoint.interval_minutes (now {interval:g})"
    if phase == "sample":
        return "sac.batch_size", f"lower sac.batch_size (now {config.sac.batch_size})"
    if phase == "update":
        if spare:
            return "learner.threads", f"raise learner.threads (now {cpu_threads(config.learner.threads)})"
        return "replay_ratio", f"lower replay_ratio (now {config.replay_ratio:g})"
    if phase in ("gather", "scatter"):
        advice = f"raise inference.batch_wait_ms ({_batch_wait(config)}), for fewer and larger batches"
        return "inference.batch_wait_ms", advice
    if phase in ("host_to_device", "device_to_host"):
        if profile.uploads == "gathered" or phase == "device_to_host":
            return "", "only a faster link to the GPU would help"
        return "", "ask `python -m dsrl_async.doctor` why observations go up row by row"
    if spare:
        return "inference.threads", f"raise inference.threads (now {cpu_threads(config.inference.threads)})"
    if phase == "denoise" and "denoise_steps" in policy_settings:
        return "policy.denoise_steps", f"lower policy.denoise_steps (now {config.policy.denoise_steps})"
    if "compile" in policy_settings and not config.policy.compile and config.policy.kernels != "triton":
        return "policy.compile", "set policy.compile, which fuses its kernels"
    if "options" in policy_settings:
        return "device", "give it a faster device, or let it do less where its policy.options can"
    return "device", "give it a faster device"


def _batch_wait(config: Config) -> str:
    wait = config.inference.batch_wait_ms
    return "now its default" if wait is None else f"now {wait:g}"


def _more_actors(profile: RunProfile, config: Config) -> tuple[str, str]:
    if profile.free_cores >= 0.5:
        return "actors", f"raise actors (now {config.actors})"
    return "actors", f"more cores are needed for more actors (now {config.actors})"
