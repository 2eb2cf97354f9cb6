"""From where the time of a run's processes goes to one sentence: what holds throughput back, and what to change.

`diagnose` is a pure function. It reasons as one does about a closed loop of stations: whoever is busy nearly all the
time holds up the others, who wait for it. Where nobody is, either the cores are used up, or the processes take turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dsrl_async.config.settings import Config
from dsrl_async.host.machine import cpu_threads
from dsrl_async.telemetry.profile.hardware import Gpu

SATURATED = 0.75
"""A process that is busy for this share of its time holds up the others."""
CONTENDED = 1 / 3
"""So much of its busy time spent waiting for a core makes the cores the bottleneck, and not the work."""
CORES_FULL = 0.9
"""The cores count as used up from this share on."""
STARVED = 0.5
"""A process that waits for a core for this share of its time does not come up because of those who have them."""
NOTICEABLE = 0.25
"""A wait is worth naming from this share on."""
FEWEST_DECISIONS, FEWEST_SECONDS = 20, 1.0
"""Nothing is said about less."""

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
"""(kind of process, phase or stage) -> what it does."""
SERIAL = "serial"
"""The one process of a `--serial` run."""
OWNERS = {"actor": "the actors'", "inference": "the inference process's", "learner": "the learner's"}


@dataclass(frozen=True)
class ProcessFigures:
    """The processes of one kind."""

    count: int
    phases: dict[str, float]
    """Phase or stage -> share of a process's time, mean over the processes; waits are named `wait_...`."""
    cores: float
    """CPU seconds per second, all processes and threads."""
    queued: float
    """Share of time for which a process was ready to run and had no core, mean over the processes."""
    memory_mb: float
    """Private memory of one process."""

    @property
    def busy(self) -> float:
        return min(1.0, sum(share for name, share in self.phases.items() if not name.startswith("wait_")))

    @property
    def largest(self) -> str:
        """The phase that takes most of the time, waits aside."""
        work = {name: share for name, share in self.phases.items() if not name.startswith("wait_")}
        return max(work, key=work.__getitem__)


@dataclass(frozen=True)
class Figures:
    """Of a stretch of a run."""

    seconds: float
    warmed_up: bool
    """It begins after the warm-up: the learner learns."""
    decisions: int
    env_steps: int
    updates: int
    batch_size: float
    batch_fill: float
    queue_wait_ms: float
    processes: dict[str, ProcessFigures]
    """actor, inference, learner, supervisor; of a serial run `serial` in the place of the last, with all CPU time."""
    core_shares: tuple[float, ...]
    """Busy share of each core that the run may use, whoever used it."""
    cpus: int
    """Cores that the run may keep busy: fewer than it may use, where it has a quota."""
    on_gpu: dict[str, bool]
    """inference, learner -> whether it computes on a GPU."""
    gpus: tuple[Gpu, ...]
    cupy: bool
    """It is installed, and page-locks the shared memory where a GPU is used."""

    @property
    def system_processes(self) -> dict[str, ProcessFigures]:
        """Those that the system knows: in a serial run one process does everybody's work."""
        return {SERIAL: self.processes[SERIAL]} if SERIAL in self.processes else self.processes

    @property
    def cores(self) -> float:
        """Cores that the run used."""
        return sum(process.cores for process in self.processes.values())

    @property
    def cores_of_others(self) -> float:
        """Cores that other programs used."""
        return max(0.0, sum(self.core_shares) - self.cores)

    @property
    def free_cores(self) -> float:
        """Cores that nobody uses, and that the run may use beside those that it has."""
        return max(0.0, min(self.cpus - self.cores, len(self.core_shares) - self.cores - self.cores_of_others))


class Diagnosis(NamedTuple):
    process: str
    """Whose work is the bottleneck: actor, inference, learner; `cpu` or `other_programs`; `turns` where nobody is
    always busy; `nothing` before there is anything to say."""
    phase: str
    """The phase that takes most of its time; of `cpu` that which takes most of the CPU time, as `kind/phase`."""
    setting: str
    """The key of the configuration to change; empty where there is none."""
    sentence: str


def diagnose(figures: Figures, config: Config) -> Diagnosis:
    """What holds the run back."""
    kinds = {kind: figures.processes[kind] for kind in OWNERS}
    starved = max(kinds, key=lambda kind: kinds[kind].queued)
    if figures.decisions < FEWEST_DECISIONS or figures.seconds < FEWEST_SECONDS:
        others_have_cores = figures.cores_of_others > figures.cores and kinds[starved].queued >= STARVED
        if figures.seconds >= FEWEST_SECONDS and others_have_cores:  # why there is so little
            return _of_cpu(starved, figures, config)
        few = f"only {figures.decisions} decisions in {figures.seconds:.1f} s were seen"
        return Diagnosis("nothing", "", "", f"There is nothing to say about a bottleneck yet: {few}.")
    busiest = max(kinds, key=lambda kind: kinds[kind].busy)
    busy, queued = kinds[busiest].busy, kinds[busiest].queued
    if config.serial:  # one process: whatever takes most of its time
        busiest = max(kinds, key=lambda kind: kinds[kind].phases[kinds[kind].largest])
        return _of_stage(busiest, figures, config)
    if busy >= SATURATED:
        return _of_cpu(busiest, figures, config) if queued >= CONTENDED * busy else _of_stage(busiest, figures, config)
    # Cores may also be full of what gives way to the run, such as programs of a lower priority.
    if figures.free_cores < (1 - CORES_FULL) * figures.cpus and kinds[starved].queued >= NOTICEABLE:
        return _of_cpu(starved, figures, config)
    waits = kinds["inference"].phases
    if waits.get("wait_learner", 0.0) >= NOTICEABLE:
        return _of_stage("learner", figures, config)
    if (share := waits.get("wait_batch", 0.0)) >= NOTICEABLE:
        advice = f"lower inference.batch_wait_ms ({_batch_wait(config)})"
        wait = f"the wait for fuller batches, {share:.0%} of the inference process's time"
        sentence = f"The bottleneck is {wait}; {advice}."
        return Diagnosis("inference", "wait_batch", "inference.batch_wait_ms", sentence)
    waiting = kinds["actor"].phases.get("wait_action", 0.0)
    setting, advice = _more_actors(figures, config)
    sentence = (
        f"Nothing is busy all the time: the actors wait for {waiting:.0%} of theirs and the inference process is busy "
        f"for {kinds['inference'].busy:.0%} of its, taking turns; {advice}."
    )
    return Diagnosis("turns", "wait_action", setting, sentence)


def _of_stage(kind: str, figures: Figures, config: Config) -> Diagnosis:
    """The work of a kind of process is the bottleneck."""
    process = figures.processes[kind]
    phase = process.largest
    setting, advice = _advice(kind, phase, figures, config)
    owner = "the run's" if config.serial else OWNERS[kind]
    sentence = f"The bottleneck is {WORK[kind, phase]}, {process.phases[phase]:.0%} of {owner} time; {advice}."
    return Diagnosis(kind, phase, setting, sentence)


def _of_cpu(waiting: str, figures: Figures, config: Config) -> Diagnosis:
    """The cores are; `waiting` is the kind of process that would be the first to gain from more."""
    others, queued = figures.cores_of_others, figures.processes[waiting].queued
    waits = f"a core is what {OWNERS[waiting]} work waits for during {queued:.0%} of the time"
    if others > figures.cores and figures.cores < CORES_FULL * figures.cpus:  # beyond that its quota holds it back
        sentence = (
            f"The bottleneck is other programs, which use {others:.1f} of {len(figures.core_shares)} cores while "
            f"the run gets {figures.cores:.1f}: {waits}; end them, or run elsewhere."
        )
        return Diagnosis("other_programs", "", "", sentence)
    user = max(OWNERS, key=lambda kind: figures.processes[kind].cores)
    process = figures.processes[user]
    setting, advice = _advice(user, process.largest, figures, config)
    work = f"{OWNERS[user]} work ({process.cores:.1f} cores), above all {WORK[user, process.largest]}"
    sentence = (
        f"The bottleneck is the CPU, of which the run uses {figures.cores:.1f} of {figures.cpus} cores: {waits}, and "
        f"most goes to {work}; {advice}."
    )
    return Diagnosis("cpu", f"{user}/{process.largest}", setting, sentence)


def _advice(kind: str, phase: str, figures: Figures, config: Config) -> tuple[str, str]:
    """The setting to change when a phase is the bottleneck, and in words what to do with it."""
    on_cpu = not figures.on_gpu.get(kind, False)
    spare = on_cpu and figures.free_cores >= 1
    if kind == "actor":
        if phase == "render" and config.env.name != "tabletop" and config.env.render_quality == "exact":
            return "env.render_quality", "set env.render_quality to fast, with a policy trained on such pictures"
        return _more_actors(figures, config)
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
        if figures.cupy:
            return "", "only a faster link to the GPU would help"
        return "", "install the extra `cuda`, which page-locks the shared memory"
    if spare:
        return "inference.threads", f"raise inference.threads (now {cpu_threads(config.inference.threads)})"
    if phase == "denoise":
        return "policy.denoise_steps", f"lower policy.denoise_steps (now {config.policy.denoise_steps})"
    if not config.policy.compile:
        return "policy.compile", "set policy.compile, which fuses its kernels"
    return "device", "give it a faster device"


def _batch_wait(config: Config) -> str:
    wait = config.inference.batch_wait_ms
    return "now its default" if wait is None else f"now {wait:g}"


def _more_actors(figures: Figures, config: Config) -> tuple[str, str]:
    if figures.free_cores >= 0.5:
        return "actors", f"raise actors (now {config.actors})"
    return "actors", f"more cores are needed for more actors (now {config.actors})"
