"""The doctor: every planted fault is found, said with what to do, and does not keep it from the other checks."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from support.commands import call
from support.gpus import found_gpus
from support.paths import FIXTURES

from dsrl_async.config.load import read_run_settings, validate
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.doctor import checks, probes
from dsrl_async.doctor.checks import Finding, Options
from dsrl_async.doctor.questions import questions
from dsrl_async.host import machine
from dsrl_async.host.probe import Unanswered, ask
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.run import preflight
from dsrl_async.run.inference import copies
from dsrl_async.run.worker.template import Template, TemplateError
from dsrl_async.shm.counters import Uploads

LIBERO = {"env": {"name": "libero_spatial"}}


def found(check: Any, settings: dict[str, Any], **options: Any) -> list[Finding]:
    return list(check(validate(settings), Options(**options)))


def messages(found: list[Finding], status: str) -> str:
    return "\n".join(finding.message for finding in found if finding.status == status)


def test_the_default_run_can_start_and_nothing_is_left_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsrl_async.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert {finding["check"] for finding in report["findings"]} == set(checks.CHECKS) - {"actor", "ray"}
    assert "needs no OpenGL" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_several_faults_are_all_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(checks, "ask", lambda *_: {"torch": "2", "built_for": None, "devices": 0, "available": False})
    arguments = ["--policy.checkpoint", str(tmp_path / "none"), "--run-dir", str(tmp_path / "file" / "run")]
    done = call("doctor", *arguments, "--actors", "3000", "--replay.capacity", "50000")
    assert done.code == 1
    printed = done.stdout
    problems = [line for line in printed.splitlines() if line.startswith("problem")]
    assert [line.split()[1] for line in problems] == ["policy", "memory", "run"]
    assert "no directory or safetensors file" in problems[0]
    assert "lower actors" in problems[1]
    assert "cannot write to" in problems[2]
    assert printed.splitlines()[-1] == "This run cannot start before the problems are solved."


def test_configuration_that_cannot_be_read_is_a_problem() -> None:
    done = call("doctor", "--json", "--sac.gama", "1")
    assert done.code == 1
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["check"] == "configuration"
    assert "--sac.gamma" in finding["message"]
    assert call("doctor", "--time-limit-s", "soon").code == 2


def test_check_that_breaks_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config, options: Options) -> Any:
        raise RuntimeError("two\nlines")
        yield

    monkeypatch.setattr(checks, "CHECKS", {"broken": broken, "open files": checks.check_descriptors})
    first, second = checks.examine(validate({}), Options())
    assert (first.check, first.status) == ("broken", "problem")
    assert "RuntimeError: two lines" in first.message
    assert second.status == "ok"


@pytest.mark.parametrize(
    ("arguments", "first", "others"),
    [
        (["--env.name", "nowhere"], "environment", ["graphics", "policy", "cpus", "memory"]),
        (["--env.task-ids", "[3]"], "environment", ["policy"]),
        (["--device", "cuda"], "cuda", ["memory"]),
    ],
)
def test_a_problem_that_ends_several_checks_is_told_once(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], first: str, others: list[str]
) -> None:
    none = {"torch": "2.13", "built_for": None, **found_gpus()}
    monkeypatch.setattr(checks, "ask", lambda *_: none)
    monkeypatch.setattr(preflight.host, "cuda_devices", lambda: none)
    done = call("doctor", "--json", *arguments)
    report = json.loads(done.stdout)
    (problem,) = [finding for finding in report["findings"] if finding["status"] == "problem"]
    assert problem["check"] == first
    assert done.stdout.count(json.dumps(problem["message"])) == 1
    skipped = {finding["check"]: finding["message"] for finding in report["findings"] if finding["status"] == "skipped"}
    assert list(skipped) == others
    assert all(message.startswith(f"see {first}") for message in skipped.values())
    assert report["verdict"] == "This run cannot start before a problem is solved."


# Questions

ASKED = {
    "graphics": "No EGL, black pictures, or an error of `eglInitialize`?",
    "shm": "The container has a small `/dev/shm`, or none. `--shm-size`?",
    "memfd": "The container has a small `/dev/shm`, or none. `--shm-size`?",
    "memory": "Is it out of memory?",
    "GPUs": "There are two GPUs. What do they do?",
    "SLURM": "How do I run it under SLURM?",
    "checkpoint": "Why isn't my checkpoint recognised?",
    "tokenizer": "Where is the tokenizer?",
    "disk": "The disk is full. What now?",
    "no GPU": "`torch finds no CUDA device`: why is the GPU not used?",
}


@pytest.fixture
def cause(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the cause of one of the questions; returns the options to give."""
    arguments = ["--device", "cpu"]
    gpus: tuple[int, ...] = (2**34,)
    match request.param:
        case "graphics":
            monkeypatch.setenv("MUJOCO_GL", "bogus")
            arguments += ["--config", "libero_spatial_small"]
        case "shm":
            whole, small = os.statvfs, SimpleNamespace(f_blocks=16, f_frsize=4096)
            monkeypatch.setattr(checks.os, "statvfs", lambda path: small if path == "/dev/shm" else whole(path))
        case "memfd":

            def forbidden(name: str) -> int:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

            monkeypatch.setattr(os, "memfd_create", forbidden)
        case "memory":
            monkeypatch.setattr("dsrl_async.run.preflight.memory.available_memory", lambda: 1 << 28)
        case "GPUs":
            gpus, arguments = (2**34, 2**34), ["--learner.device", "cuda:1"]
            monkeypatch.setattr(preflight, "check_gpu_memory", lambda _: {})
        case "SLURM":
            monkeypatch.setenv("SLURM_JOB_ID", "77")
        case "disk":
            monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
        case "no GPU":
            gpus, arguments = (), ["--device", "cuda"]
        case "checkpoint" | "tokenizer" as missing:
            policy = Path(shutil.copytree(EMBEDDED_POLICY, tmp_path / "policy"))
            (policy / ("tokenizer.json" if missing == "tokenizer" else "model.safetensors")).unlink()
            arguments += ["--policy.checkpoint", str(policy)]
    answer = {"torch": "2.13", "built_for": "13", "device": "X", "uploads": 3, "uploads_reason": ""}
    monkeypatch.setattr(checks, "ask", lambda *_: {**answer, **found_gpus(*gpus)})
    monkeypatch.setattr(preflight.host, "cuda_devices", lambda: found_gpus(*gpus))
    return arguments


@pytest.mark.parametrize(("cause", "question"), ASKED.items(), indirect=["cause"], ids=ASKED)
def test_the_question_that_a_finding_is_about_is_answered(cause: list[str], question: str) -> None:
    """In the words of the page; the verdict stays the last line."""
    assert json.loads(call("doctor", "--json", *cause).stdout)["questions"] == [question]
    (known,) = (known for known in questions() if known.question == question)
    printed = call("doctor", *cause).stdout
    words = " ".join(printed.split())
    assert all(sentence in words for sentence in (known.question, known.answer, *known.mend))
    assert all(f"\n    {command.run}\n" in printed for command in known.find_out)
    assert printed.splitlines()[-1].startswith("This run can")


def test_what_ends_a_run_is_answered_before_what_slows_it(tmp_path: Path) -> None:
    """A missing directory needs no page about idle workers."""
    few = {"actors": 64, "inference": {"threads": 64}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(few))
    arguments = ["doctor", "--json", "--device", "cpu", "--config", str(tmp_path / "few.yaml")]
    slow = json.loads(call(*arguments).stdout)["questions"]
    broken = json.loads(call(*arguments, "--policy.checkpoint", str(tmp_path / "nothing")).stdout)
    assert any(finding["status"] == "warning" for finding in broken["findings"])
    assert slow
    assert not set(slow) & set(broken["questions"])


def test_no_question_without_a_cause() -> None:
    assert json.loads(call("doctor", "--json").stdout)["questions"] == []


# Graphics


def test_software_rendering_beside_a_gpu_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(probe: object, *_: Any) -> dict[str, Any]:
        return {"devices": 2} if probe is probes.egl_devices else {"renderer": "llvmpipe (LLVM)", "seconds": 0.01}

    monkeypatch.setattr(checks, "ask", answer)
    for gpu in (False, True):
        monkeypatch.setattr(checks, "has_nvidia_gpu", lambda gpu=gpu: gpu)
        lines = found(checks.check_graphics, LIBERO)
        assert ("the CPU draws" in messages(lines, "warning")) == gpu
        assert "MUJOCO_EGL_DEVICE_ID=1: llvmpipe" in messages(lines, "ok")


def test_broken_backend_names_the_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(probe: object, limit: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
        if environment is None or probe is probes.egl_devices:
            raise Unanswered("killed by SIGSEGV")
        return {"renderer": "llvmpipe", "seconds": 0.01}

    monkeypatch.setattr(checks, "ask", answer)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    (finding,) = found(checks.check_graphics, LIBERO)
    assert finding.status == "problem"
    assert "cannot render (killed by SIGSEGV); set MUJOCO_GL=osmesa, which works here" in finding.message


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MUJOCO_GL": "bogus"}, "MUJOCO_GL"),
        ({"__EGL_VENDOR_LIBRARY_FILENAMES": os.devnull, "MUJOCO_GL": "egl"}, "Error"),
        ({"MUJOCO_EGL_DEVICE_ID": "77", "MUJOCO_GL": "egl"}, "Error"),
        ({"PYOPENGL_PLATFORM": "glx", "MUJOCO_GL": "egl"}, "Error"),
    ],
)
def test_rendering_that_cannot_work_is_told_in_one_line(variables: dict[str, str], words: str) -> None:
    with pytest.raises(Unanswered, match=words) as caught:
        ask(probes.render, 60.0, os.environ | variables)
    assert "\n" not in str(caught.value)


@pytest.mark.libero
@pytest.mark.skipif(find_spec("robosuite") is None, reason="needs the extra libero")
def test_rendering_works_where_libero_does() -> None:
    answer = ask(probes.render, 60.0)
    assert answer["seconds"] > 0
    assert answer["renderer"]


def planted(tmp_path: Path, code: str) -> dict[str, str]:
    """An environment in which a probe's process meets `code` when it starts."""
    (tmp_path / "sitecustomize.py").write_text(f"import ctypes, sys, time\nif '-m' in sys.orig_argv: {code}\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def test_probe_that_hangs_or_crashes_is_ended(tmp_path: Path) -> None:
    with pytest.raises(Unanswered, match=r"no answer within 0\.5 s"):
        ask(probes.render, 0.5, planted(tmp_path, "time.sleep(1000)"))
    with pytest.raises(Unanswered, match="killed by SIGSEGV"):
        ask(probes.render, 60.0, planted(tmp_path, "ctypes.string_at(0)"))
    assert psutil.Process().children() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_ends_the_doctor_and_what_it_started(tmp_path: Path, number: signal.Signals) -> None:
    only_probes = "'dsrl_async.host.probe' in sys.orig_argv and time.sleep(1000)"
    doctor = subprocess.Popen(
        [sys.executable, "-m", "dsrl_async.doctor"], env=planted(tmp_path, only_probes), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(doctor.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    doctor.send_signal(number)
    _, stderr = doctor.communicate(timeout=20)
    assert doctor.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert b"Traceback" not in stderr
    if number != signal.SIGKILL:  # before it begins, a probe's process does not end with a killed parent
        assert psutil.wait_procs(children, timeout=5)[1] == []
    for child in children:
        if child.is_running():
            child.kill()


# Memory, CPUs, CUDA


def test_memory_names_how_many_actors_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: 4 << 30)
    monkeypatch.setattr("dsrl_async.run.preflight.memory.available_memory", lambda: 4 << 30)
    line = messages(found(checks.check_memory, {"actors": 2}), "ok")
    fit = int(line.split("; ")[-1].split()[0])
    found(checks.check_memory, {"actors": fit})
    with pytest.raises(ConfigError, match=r"lower replay\.capacity or actors"):
        found(checks.check_memory, {"actors": fit + 1})


def test_an_actor_is_measured_and_gone(tmp_path: Path) -> None:
    (finding,) = found(checks.check_actor, {}, measure=True)
    assert finding.status == "ok"
    assert "MB private" in finding.message
    assert "MB that all share" in finding.message
    assert psutil.Process().children() == []
    assert found(checks.check_actor, {}) == []


def test_an_actor_that_cannot_be_forked_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(*arguments: object) -> None:
        raise TemplateError("the template of the environment workers is of no use: it has ended")

    monkeypatch.setattr(Template, "fork", fork)
    with pytest.raises(
        ConfigError, match="no environment worker can be started: the template of the environment workers is of no use"
    ):
        found(checks.check_actor, {}, measure=True)
    assert psutil.Process().children() == []


def test_actor_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ConfigError, match=r"the environment workers' template was not ready within 0\.01 s"):
        found(checks.check_actor, {}, measure=True, time_limit_s=0.01)
    assert psutil.Process().children() == []


def test_control_groups_limit_memory_and_cpus(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    outer, inner = tmp_path / "v2" / "job", tmp_path / "v2" / "job" / "step"
    inner.mkdir(parents=True)
    membership.write_text("0::/job/step\n")
    (outer / "memory.max").write_text("5000000\n")
    (outer / "memory.current").write_text("3000000\n")
    (outer / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    (inner / "memory.max").write_text("max\n")
    (outer / "cpu.max").write_text("max 100000\n")
    assert machine.available_memory(tmp_path / "v2", membership) == 2_500_000
    unlimited = machine.available_cpus(tmp_path / "v2", membership)
    (inner / "cpu.max").write_text("50000 100000\n")
    assert machine.available_cpus(tmp_path / "v2", membership) == 1 <= unlimited
    v1 = tmp_path / "v1" / "memory" / "job"
    v1.mkdir(parents=True)
    membership.write_text("4:memory:/job\n")
    (v1 / "memory.limit_in_bytes").write_text("7000000\n")
    (v1 / "memory.usage_in_bytes").write_text("1000000\n")
    (v1 / "memory.stat").write_text("total_inactive_file 0\n")
    assert machine.available_memory(tmp_path / "v1", membership) == 6_000_000
    (v1 / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.available_memory(tmp_path / "v1", membership) > 7_000_000
    membership.write_text("0::/gone\n")  # of the host, and not to be seen from inside
    assert machine.available_memory(tmp_path / "v2", membership) > 7_000_000


def test_oversubscribed_cpus_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_cpus", lambda: 4)
    for name in checks.processes.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert messages(found(checks.check_cpus, {}), "warning") == ""
    assert "inference.threads" in messages(found(checks.check_cpus, {"inference": {"threads": 4}}), "warning")
    assert "wait for one another" in messages(found(checks.check_cpus, {**LIBERO, "actors": 9}), "warning")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert "OMP_NUM_THREADS=64 on 4 cores" in messages(found(checks.check_cpus, {}), "warning")


GPU = {"built_for": "13", "device": "X", **found_gpus(2**31)}
NO_GPU = found_gpus()


@pytest.mark.parametrize(
    ("answer", "gpu", "status", "words"),
    [
        ({"built_for": None, **NO_GPU}, True, "warning", "install one with CUDA"),
        ({"built_for": "13.0", **NO_GPU, "reason": "it is of 2019"}, True, "warning", "(it is of 2019); its driver"),
        ({"built_for": None, **NO_GPU}, False, "ok", "uses the CPU"),
        (
            {**GPU, **found_gpus(2**31, 1), "faults": ("", "it is busy"), "uploads": 3},
            True,
            "warning",
            "cuda:1: it is busy",
        ),
        (
            {**GPU, "uploads": 2, "uploads_reason": "cupy is not installed"},
            True,
            "warning",
            "row by row: cupy is not installed",
        ),
        (
            {**GPU, "uploads": 3, "uploads_reason": ""},
            True,
            "ok",
            "in one launch",
        ),
    ],
)
def test_cuda(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], gpu: bool, status: str, words: str) -> None:
    monkeypatch.setattr(checks, "ask", lambda *_: {"torch": "2.13", **answer})
    monkeypatch.setattr(checks, "has_nvidia_gpu", lambda: gpu)
    assert words in messages(found(checks.check_cuda, {}), status)


def test_triton_kernels_are_said_to_be_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ask", lambda *_: {"torch": "2.13", **GPU, "uploads": 3, "uploads_reason": ""})
    monkeypatch.setattr(checks.preflight, "check_kernels", lambda config: None)
    asked = {"policy": {"kernels": "triton"}}
    assert "not run on a GPU yet" in messages(found(checks.check_cuda, asked), "warning")
    assert messages(found(checks.check_cuda, {}), "warning") == ""


def test_triton_kernels_are_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ask", lambda *_: {"torch": "2.13", "built_for": None, **NO_GPU})
    monkeypatch.setattr(checks, "has_nvidia_gpu", lambda: False)
    with pytest.raises(ConfigError, match=r"^policy\.kernels: .* computed on the CPU"):
        found(checks.check_cuda, {"policy": {"kernels": "triton"}, "device": "cpu"})


@pytest.mark.parametrize(("faults", "uploads"), [(("", "busy"), Uploads.PAGE_LOCKED), (("busy", ""), None)])
def test_what_is_asked_of_cuda(
    monkeypatch: pytest.MonkeyPatch, faults: tuple[str, ...], uploads: Uploads | None
) -> None:
    """The probe itself, on a machine that pretends to have two GPUs, and no cupy."""
    locked: list[tuple[int, int, torch.device]] = []
    monkeypatch.setattr(probes, "cuda_devices", lambda: {**found_gpus(1, 1), "faults": faults})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"number {index}")
    monkeypatch.setattr(copies, "register_memory", lambda *arguments: locked.append(arguments))
    monkeypatch.setitem(sys.modules, "cupy", None)
    answer = json.loads(json.dumps(probes.cuda()))
    assert answer["torch"] == torch.__version__
    assert answer.get("uploads") == uploads
    if uploads is None:
        assert "device" not in answer
        assert locked == []
    else:
        assert answer["device"] == "number 0"
        assert "cupy is not installed" in answer["uploads_reason"]
        ((address, size, device),) = locked
        assert address % mmap.PAGESIZE == size % mmap.PAGESIZE == 0 < size
        assert device == torch.device("cuda", 0)


# LIBERO, policy, run directory


def test_conflicting_liberos_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("libero") is None:
        pytest.skip("needs the extra libero")
    monkeypatch.setattr(checks, "packages_distributions", lambda: {"libero": ["mujoco", "robosuite"]})
    assert "uninstall all but one" in messages(found(checks.check_environment, LIBERO), "warning")
    monkeypatch.setattr(checks.libero_files, "bddl_file", lambda *_: Path("nowhere.bddl"))
    with pytest.raises(ConfigError, match=r"nowhere\.bddl"):
        found(checks.check_environment, LIBERO)


def test_policy_without_its_tokenizer_is_a_problem(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_POLICY, tmp_path / "policy")
    settings = {"policy": {"checkpoint": str(tmp_path / "policy")}}
    line = messages(found(checks.check_policy, settings), "ok")
    assert "Pi0 as dsrl_async stores it, 645,760 parameters in 2.6 MB of F32" in line
    (tmp_path / "policy" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        found(checks.check_policy, settings)


def test_a_run_that_was_made_with_another_policy_is_a_problem(tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(FIXTURES / "run_beb78af", tmp_path / "run"))
    settings = read_run_settings(run_dir) | {"resume": str(run_dir), "run_dir": str(run_dir), "max_decisions": 900}
    assert found(checks.check_run_directory, settings)[0].status == "ok"
    made_with = preflight.made_with(preflight.check_run(validate(settings)))
    made_with["policy"]["weights"] = "another"
    preflight.record_made_with(run_dir, made_with)
    with pytest.raises(ConfigError, match=r"is not the policy that .* it differs in weights"):
        found(checks.check_run_directory, settings)


def test_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"run_dir": str(tmp_path / "run")}
    assert found(checks.check_run_directory, settings)[0].status == "ok"
    assert list(tmp_path.iterdir()) == []
    for free, status in ((1 << 20, "problem"), (1 << 29, "warning")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        (finding,) = found(checks.check_run_directory, settings)
        assert finding.status == status
        assert "lower replay.capacity" in finding.message
