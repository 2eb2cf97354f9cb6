"""The checks: each yields findings about one thing that a run with a configuration needs.

What `launch` refuses is decided in `preflight` alone: a check calls its functions, and whoever runs the check makes a
problem of the ConfigError.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from dsrl_async import __version__
from dsrl_async.config.files import how_to_install
from dsrl_async.config.load import to_yaml
from dsrl_async.config.settings import MIN_LANE_ROWS, Config, ConfigError, EvaluationConfig
from dsrl_async.doctor.cluster import look_at_cluster
from dsrl_async.doctor.probes import cuda, egl_devices, render
from dsrl_async.envs import graphics, libero_files
from dsrl_async.groups.ray_placement import check_library, own_address
from dsrl_async.host import processes
from dsrl_async.host.environments import environment_record
from dsrl_async.host.machine import available_cpus, available_memory, cpu_threads
from dsrl_async.host.probe import Unanswered, ask
from dsrl_async.run import preflight
from dsrl_async.run.worker.pool import WorkerPool
from dsrl_async.shm.arena import layout
from dsrl_async.shm.counters import ACTOR_PHASES, Counters, Uploads
from dsrl_async.shm.memory import run_fields
from dsrl_async.telemetry.loggers import check_loggers
from dsrl_async.telemetry.usage import template_bytes

Status = Literal["ok", "warning", "problem", "skipped"]
"""`skipped`: nothing can be said before a problem is solved that another check has named."""
SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast", "software")
ACTORS_PER_CPU = 2
"""More environment workers than this on a core wait for one another; LIBERO's simulate nearly all of the time."""
GIB = 2**30
CLUSTER_PATIENCE = 5
"""How much longer than another process that of the check of a cluster may take: it may start one, and asks others."""


class Finding(NamedTuple):
    """What a check found."""

    check: str
    status: Status
    message: str
    """What is there; for a warning or a problem, also what to do."""


class Options(NamedTuple):
    """How thoroughly to look."""

    measure: bool = False
    """Start an environment worker and measure it."""
    time_limit_s: float = 60.0
    """Upper limit for each process that a check starts."""


def has_nvidia_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def check_graphics(config: Config, options: Options) -> Iterator[Finding]:
    environment = environment_record(config.env.model_dump())
    if not environment.needs_opengl:
        yield Finding("graphics", "ok", f"{config.env.name} needs no OpenGL")
        return
    preflight.check_graphics(environment)
    chosen = graphics.variables()["MUJOCO_GL"]
    failure, software = None, False
    try:
        answer = ask(render, options.time_limit_s)
        software = any(name in answer["renderer"].lower() for name in SOFTWARE_RENDERERS)
        yield Finding("graphics", "ok", f"MUJOCO_GL={chosen}: {_drawn(answer)}")
    except Unanswered as error:
        failure = str(error)
    working = []
    for other in {"egl", "osmesa"} - {chosen} if failure else ():
        try:
            ask(render, options.time_limit_s, _graphics_environment(other))
            working.append(other)
        except Unanswered:
            continue
    if failure:
        remedy = f"set MUJOCO_GL={working[0]}, which works here" if working else graphics.remedy(chosen)
        yield Finding("graphics", "problem", f"MUJOCO_GL={chosen} cannot render ({failure}); {remedy}")
    if software and has_nvidia_gpu():
        yield Finding(
            "graphics",
            "warning",
            "there is an NVIDIA GPU, but the CPU draws; install the driver's EGL (in containers, add graphics to "
            "NVIDIA_DRIVER_CAPABILITIES), or choose another device with MUJOCO_EGL_DEVICE_ID",
        )
    if chosen == "egl":
        yield from _egl_devices(options)


def _graphics_environment(backend: str, device: int | None = None) -> dict[str, str]:
    """The environment with another backend or device."""
    kept = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    return kept | {"MUJOCO_GL": backend} | ({} if device is None else {"MUJOCO_EGL_DEVICE_ID": str(device)})


def _drawn(answer: dict[str, Any]) -> str:
    return f"{answer['renderer']} draws two cameras of a small scene in {1000 * answer['seconds']:.1f} ms"


def _egl_devices(options: Options) -> Iterator[Finding]:
    """A line for each of several devices."""
    try:
        count = ask(egl_devices, options.time_limit_s)["devices"]
    except Unanswered:
        return  # the check of the backend that is used says whether that matters
    for device in range(count) if count > 1 else ():
        try:
            answer = ask(render, options.time_limit_s, _graphics_environment("egl", device))
            yield Finding("graphics", "ok", f"MUJOCO_EGL_DEVICE_ID={device}: {_drawn(answer)}")
        except Unanswered as error:
            yield Finding(
                "graphics", "warning", f"MUJOCO_EGL_DEVICE_ID={device} cannot render ({error}); leave it alone"
            )


def check_environment(config: Config, options: Options) -> Iterator[Finding]:
    spec = preflight.check_environment(config)
    record = environment_record(config.env.model_dump())
    if record.suite is None:
        found = record.versions() | {"numpy": version("numpy")}
        on = ", ".join(f"{name} {number}" for name, number in found.items())
        shapes = (
            f"{spec.cameras} cameras of {spec.image_size} pixels, a state of {spec.state_dim} and actions of "
            f"{spec.action_dim} numbers, {counted(len(spec.prompts), 'prompt')}, {record.episode_steps} steps"
        )
        where = f" in {record.file}" if record.file is not None else ""
        yield Finding("environment", "ok", f"{record.name}{where} on {on}: {shapes}")
        return
    providers = sorted(set(packages_distributions().get("libero", ())))
    names = ", ".join(f"{name} {version(name)}" for name in providers) or f"a source checkout at {libero_files.root()}"
    if len(providers) > 1:
        yield Finding(
            "environment", "warning", f"LIBERO comes from {names}; uninstall all but one, then install it anew"
        )
    try:
        libero_files.prepare_import()
        tasks = libero_files.selected_tasks(record.suite, config.env.task_ids)
        warnings = preflight.check_files(record)
        states = sum(len(libero_files.init_states(record.suite, task)) for task in tasks)
    except ValueError as error:
        raise ConfigError(f"env.name: {str(error).removeprefix('env.name: ')}") from error
    yield from (Finding("environment", "warning", warning) for warning in warnings)
    versions = []
    for name in ("mujoco", "robosuite", "numpy"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding("environment", "problem", f"{name} is not installed; {how_to_install('libero')}")
    yield Finding(
        "environment",
        "ok",
        f"{config.env.name}: {counted(len(spec.prompts), 'task')} with {states} initial states and assets, "
        f"from {names}, on {', '.join(versions)}",
    )


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def check_policy(config: Config, options: Options) -> Iterator[Finding]:
    policy = preflight.check_checkpoint(config)
    where = "" if policy.directory is None else f"{policy.directory}: "
    yield Finding("policy", "ok", f"{where}{policy.description}")
    yield from (Finding("policy", "warning", warning) for warning in policy.warnings)
    spec = preflight.check_environment(config)
    config = preflight.fit_agent(config, policy.spec, spec)
    preflight.check_fit(config, policy.spec, spec)
    preflight.check_prompts(policy, spec)
    yield from (Finding("policy", "warning", said) for said in preflight.check_instructions(config, policy, spec))
    preflight.check_render_quality(config, policy.maker)
    yield Finding("policy", "ok", f"it fits the environment {config.env.name} and the agent")


def check_extras(config: Config, options: Options) -> Iterator[Finding]:
    """The libraries of an environment and of a policy are looked for with these."""
    check_loggers(config)
    preflight.check_films(config)
    preflight.check_compiler(config)
    films = " and films" if config.evaluation.lanes and config.evaluation.films else ""
    yield Finding(
        "extras", "ok", f"the libraries for {', '.join(config.log.loggers) or 'no logs'}{films} are installed"
    )


def workers_of(config: Config) -> str:
    evaluation = config.evaluation.lanes
    return f"{config.actors} actors" + (f" and {evaluation} of the evaluation" if evaluation else "")


def check_memory(config: Config, options: Options) -> Iterator[Finding]:
    available = available_memory()
    try:
        run = preflight.check_run(config)
    except ConfigError:
        record = environment_record(config.env.model_dump())
        actors = record.template_bytes + config.lanes * record.worker_bytes
        yield Finding(
            "memory",
            "ok" if actors < available else "problem",
            f"{available / GIB:.1f} GiB available, about {actors / GIB:.1f} needed by {workers_of(config)}"
            f"{'' if actors < available else '; lower actors'} (the policy's share is not known yet)",
        )
        return
    need = preflight.memory_needed(config, run.environment, run.spec, run.policy.needs)
    yield from _shm(need.shared)
    fit = preflight.actors_that_fit(config, run.environment, run.spec, run.policy.needs, available)
    preflight.check_memory(run)
    yield Finding(
        "memory",
        "ok",
        f"{available / GIB:.1f} GiB available, about {need.total / GIB:.1f} needed ({need.shared / GIB:.1f} shared, "
        f"{need.policy / GIB:.1f} the policy, {need.agent / GIB:.1f} the agent, {need.template / GIB:.1f} of all "
        f"actors, {need.worker / GIB:.2f} each of {need.workers}); {fit} actors fit",
    )
    if (told := preflight.memory_of_algorithm(run)) is not None:
        yield Finding("memory", "ok", told)
    yield from check_gpu_memory(config, options)


def _shm(shared: int) -> Iterator[Finding]:
    """What containers limit, and people look for first, where it is less than what a run shares."""
    try:
        there = os.statvfs("/dev/shm")
        size = there.f_blocks * there.f_frsize
    except OSError:
        size = 0
    if size < shared:
        yield Finding("memory", "ok", f"/dev/shm holds {size / 2**20:,.0f} MiB, which is no limit for a run")


def check_gpu_memory(config: Config, options: Options) -> Iterator[Finding]:
    preflight.check_devices(config)
    for device, memory in preflight.check_gpu_memory(preflight.check_run(config)).items():
        yield Finding(
            "memory",
            "ok",
            f"cuda:{device}: {memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB free, about "
            f"{preflight.describe(memory.need)} needed",
        )


def check_descriptors(config: Config, options: Options) -> Iterator[Finding]:
    preflight.check_descriptors(config)
    yield Finding("open files", "ok", f"enough for {workers_of(config)}")


def check_channel(config: Config, options: Options) -> Iterator[Finding]:
    if not config.serial:
        preflight.check_channel()
        yield Finding("channel", "ok", "the learner's weights have a place that only this user may enter, and keys")


def check_actor(config: Config, options: Options) -> Iterator[Finding]:
    """Start an environment worker of this configuration and look at it when it has the first observation."""
    if not options.measure:
        return
    spec = preflight.check_environment(config)
    replay = config.replay.model_copy(update={"capacity": MIN_LANE_ROWS})
    config = config.model_copy(update={"actors": 1, "replay": replay, "evaluation": EvaluationConfig()})
    fields = run_fields(config, spec, config.env.chunk)
    begin = time.monotonic()
    try:
        with WorkerPool(config, fields, start_limit_s=options.time_limit_s) as pool:
            pool.await_template()
            prepared_s = time.monotonic() - begin
            pool.fork_workers()
            pool.await_observations()
            started_s = time.monotonic() - begin - prepared_s
            template, worker = map(psutil.Process, pool.pids)
            memory, shared = worker.memory_full_info(), template_bytes(template)
            phase_s = dict(zip(ACTOR_PHASES, Counters(pool.arena).actor_phase_s[0].tolist(), strict=True))
    except RuntimeError as error:
        raise ConfigError(f"no environment worker can be started: {error}") from error
    estimate = environment_record(config.env.model_dump()).worker_bytes
    message = (
        f"what all share is ready after {prepared_s:.1f} s, an actor {started_s:.1f} s later (first reset "
        f"{phase_s['reset']:.1f} s, pictures {phase_s['render']:.2f} s); memory {memory.uss / 1e6:,.0f} MB private and "
        f"{shared / 1e6:,.0f} MB that all share; {max(0, (available_memory() - shared) // memory.uss)} such actors fit "
        "beside nothing else"
    )
    if memory.uss > estimate:
        message += f"; that is more than the {estimate / 1e6:,.0f} MB that are reckoned with: start fewer of them"
    yield Finding("actor", "warning" if memory.uss > estimate else "ok", message)


def check_cpus(config: Config, options: Options) -> Iterator[Finding]:
    cpus = available_cpus()
    if job := os.environ.get("SLURM_JOB_ID"):
        yield Finding("cpus", "ok", f"SLURM job {job}: {cpus} of the node's {os.cpu_count()} cores may be used")
    inference = cpu_threads(config.inference.threads)
    learner = cpu_threads(config.learner.threads)
    yield Finding(
        "cpus",
        "ok",
        f"{cpus} of the machine's {os.cpu_count()} may be used; {workers_of(config)} of one thread; "
        f"threads of inference: {inference}, of the learner: {learner}",
    )
    if inference + learner > max(2, cpus):
        yield Finding(
            "cpus",
            "warning",
            f"inference.threads and learner.threads are {inference + learner} together on {cpus} cores, which slows "
            "both down; lower them, or leave them null",
        )
    if environment_record(config.env.model_dump()).needs_opengl and config.lanes > ACTORS_PER_CPU * cpus:
        yield Finding(
            "cpus",
            "warning",
            f"{workers_of(config)} of {config.env.name} on {cpus} cores wait for one another and fill the memory; "
            f"lower actors to {ACTORS_PER_CPU * cpus} or fewer",
        )
    for name in processes.THREAD_VARIABLES:
        threads = os.environ.get(name, "")
        if threads.isdigit() and int(threads) > cpus:
            yield Finding(
                "cpus",
                "warning",
                f"{name}={threads} on {cpus} cores slows numeric libraries down outside the run's own processes, which "
                "have their own value; unset it",
            )


def check_cuda(config: Config, options: Options) -> Iterator[Finding]:
    found = ask(cuda, options.time_limit_s)
    preflight.check_device("device", config.device, found)
    preflight.check_device("learner.device", config.learner.device, found)
    build = f"torch {found['torch']} ({'CUDA ' + found['built_for'] if found['built_for'] else 'without CUDA'})"
    driver = _nvidia_smi(options.time_limit_s)
    if not found["devices"]:
        if has_nvidia_gpu() and config.device != "cpu":
            remedy = (
                "its driver is too old or not loaded, see nvidia-smi" if found["built_for"] else "install one with CUDA"
            )
            why = f" ({found['reason']})" if found["built_for"] and found["reason"] else ""
            yield Finding(
                "cuda", "warning", f"there is an NVIDIA GPU{driver}, but {build} cannot use it{why}; {remedy}"
            )
        else:
            yield Finding("cuda", "ok", f"{build}, device {config.device}: the run uses the CPU")
        preflight.check_kernels(config)
        return
    devices = {"policy": config.device, "learner": config.learner.device or config.device}
    users = [user for user, device in devices.items() if device != "cpu"]
    used = f"for {' and '.join(users)}" if users else "not used, as device is cpu"
    for index, fault in enumerate(found["faults"]):
        if fault:
            yield Finding("cuda", "warning", f"torch cannot compute on cuda:{index}: {fault}; leave it alone")
    if "device" not in found:
        return
    if found["devices"] > 1 and not config.serial:
        on = {user: "cuda:0" if name in ("auto", "cuda") else name for user, name in devices.items()}
        finds = f"torch finds {found['devices']} GPUs: the policy is on {on['policy']}, the learner on {on['learner']}"
        yield Finding("cuda", "ok", finds)
    free = found["free_bytes"][0] / GIB
    yield Finding("cuda", "ok", f"{build}: {found['device']}, {free:.1f} GiB free{driver}, {used}")
    preflight.check_kernels(config)
    if config.policy.kernels == "triton":
        yield Finding("cuda", "warning", "policy.kernels: triton's have not run on a GPU yet (docs/gpu.md)")
    if devices["policy"] != "cpu":
        if found["uploads"] == Uploads.GATHERED:
            yield Finding("cuda", "ok", "observations go to the GPU in one launch, from page-locked memory")
        else:
            yield Finding("cuda", "warning", f"observations go to the GPU row by row: {found['uploads_reason']}")


def _nvidia_smi(time_limit_s: float) -> str:
    """`, driver VERSION`, or nothing where there is no telling."""
    if (program := shutil.which("nvidia-smi")) is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit_s, stdin=subprocess.DEVNULL)
    except (subprocess.TimeoutExpired, OSError):
        return ""
    lines = done.stdout.split() if done.returncode == 0 else []
    return f", driver {lines[0]}" if lines else ""


def check_run_directory(config: Config, options: Options) -> Iterator[Finding]:
    run_dir = preflight.choose_run_directory(config)
    place = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir: cannot write to {run_dir}; give another one with --run-dir")
    free = shutil.disk_usage(place).free
    try:
        run = preflight.check_run(config)
    except ConfigError:
        yield Finding("run directory", "ok", f"{run_dir} can be written, {free / GIB:.1f} GiB free")
        return
    if config.resume is not None:
        preflight.check_made_with(run_dir, preflight.made_with(run), run.policy.place)
    checkpoint = layout(run_fields(config, run.spec, run.horizon))[1]
    copies = config.checkpoint.keep + 1  # the one that is being written
    status: Status = "ok" if free > copies * checkpoint else "warning" if free > checkpoint else "problem"
    advice = "" if status == "ok" else "; free some, or lower replay.capacity or checkpoint.keep"
    yield Finding(
        "run directory",
        status,
        f"{run_dir} can be written, {free / GIB:.1f} GiB free; a checkpoint takes up to {checkpoint / GIB:.2f} with "
        f"the replay buffer, {copies} at a time{advice}",
    )


def check_cluster(config: Config, options: Options) -> Iterator[Finding]:
    """Ask every machine of the Ray cluster that could have a group."""
    if config.ray is None:
        return
    check_library()
    group = config.group
    of_a_group = config.model_copy(update={"groups": 1, "ray": None, "resume": None, "run_dir": None})
    address = own_address(config.ray, group.address)
    limit_s = CLUSTER_PATIENCE * options.time_limit_s
    question = {
        "ray": config.ray,
        "gpus": group.gpus,
        "cpus": group.cpus,
        "address": address,
        "ports": group.ports or [0, 0],
        "config": to_yaml(of_a_group),
        "time_limit_s": limit_s / 2,
    }
    found = ask(look_at_cluster, limit_s, argument=question)
    needs = f"{counted(group.gpus, 'GPU')} and {counted(group.cpus, 'CPU')}"
    said = f"Ray {found['ray']}, {counted(found['nodes'], 'machine')}: room for {counted(found['rooms'], 'group')} of "
    if found["rooms"] == 0:
        yield Finding("ray", "problem", f"{said}{needs}; add machines, or lower group.gpus or group.cpus")
    elif found["rooms"] < config.groups:
        late = counted(config.groups - found["rooms"], "group")
        yield Finding("ray", "warning", f"{said}{needs}; {late} will wait until a machine joins")
    else:
        yield Finding("ray", "ok", f"{said}{needs}")
    for machine in found["machines"]:
        yield from _machine(machine, address)
    if not all(machine.get("token", True) for machine in found["machines"]):
        yield Finding(
            "ray",
            "warning",
            "this cluster has no token: whoever reaches it runs programs on it in your name; set RAY_AUTH_MODE=token "
            "on every machine before `ray start` (docs/cluster.md)",
        )


def _machine(machine: dict[str, Any], address: str) -> Iterator[Finding]:
    """What is to be said of a machine of the cluster: what its doctor finds, and whether it reaches this one."""
    where = f"node {machine['where']}"
    if "error" in machine:
        yield Finding("ray", "problem", f"{where}: dsrl_async cannot be used there: {machine['error']}")
        return
    if machine["version"] != __version__:
        versions = f"dsrl_async {machine['version']} is there, and {__version__} here"
        yield Finding("ray", "problem", f"{where}: {versions}; install the same")
    if machine["unreached"]:
        ports = " and ".join(machine["unreached"])
        yield Finding(
            "ray",
            "problem",
            f"{where}: it does not reach {address}, port {ports}; set group.address to an address of this machine that "
            "it reaches, and open group.ports in the firewall",
        )
    bad = [found for found in machine["findings"] if found["check"] != "run directory" and found["status"] != "ok"]
    for finding in bad:
        yield Finding("ray", finding["status"], f"{where}: {finding['check']}: {finding['message']}")
    if not bad and machine["version"] == __version__ and not machine["unreached"]:
        yield Finding("ray", "ok", f"{where}: Python {machine['python']}, and all that a group needs")


CHECKS: dict[str, Callable[[Config, Options], Iterator[Finding]]] = {
    "environment": check_environment,
    "graphics": check_graphics,
    "policy": check_policy,
    "extras": check_extras,
    "cuda": check_cuda,
    "cpus": check_cpus,
    "memory": check_memory,
    "actor": check_actor,
    "open files": check_descriptors,
    "channel": check_channel,
    "run directory": check_run_directory,
    "ray": check_cluster,
}


def examine(config: Config, options: Options) -> Iterator[Finding]:
    """All findings in the order of `CHECKS`; one that cannot go on ends with a problem, and the next one follows.

    A problem that ends several checks is told by the first of them.
    """
    told: dict[str, str] = {}
    with contextlib.suppress(ConfigError):  # else the check of the policy says why
        config = preflight.fetch_policy(config)
    for name, check in CHECKS.items():
        try:
            yield from check(config, options)
        except (ConfigError, Unanswered) as error:
            first = told.setdefault(str(error), name)
            if first == name:
                yield Finding(name, "problem", str(error))
            else:
                yield Finding(name, "skipped", f"see {first}: the problem there comes first")
        except Exception as error:  # whatever it is, the other checks are wanted all the more
            yield Finding(name, "problem", f"the check failed: {type(error).__name__}: {' '.join(str(error).split())}")
