"""The benchmark: its figures, its output, and what it says when it cannot run."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import Done, call

from dsrl_async.bench import denoise, references, scale, synthetic
from dsrl_async.bench.figures import Figure, JsonLines, add_output_arguments
from dsrl_async.bench.systems.policy import language_length, load
from dsrl_async.bench.systems.serving import MEASUREMENTS, StageMeter, count_operations, time_stages


def bench(*options: str) -> Done:
    return call("bench", *options)


def test_one_case_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    options = ["--system", "dsrl_async", "--dtype", "float32", "--batch", "1", "--steps", "2", "--repeats", "2"]
    result = bench("denoise", *options, "--threads", "1", "--out", str(out))
    assert result.code == 0, result.stderr
    assert result.stdout == out.read_text()
    records = [json.loads(line) for line in result.stdout.splitlines()]
    keys = {"benchmark", "case", "system", "metric", "value", "unit", "repeats", "load"}
    assert all(record.keys() == keys for record in records)
    value = {record["metric"]: record["value"] for record in records}
    assert value["total"] > max(value["vision"], value["prefill"], value["denoise"]) > 0
    assert value["kernels"] == sum(value[f"kernels_{stage}"] for stage in ("vision", "prefill", "denoise"))
    assert value["host_syncs"] == 0
    assert 100 < value["peak_memory"] < 5000
    assert 0 < value["gemm_share"] < value["gemm_share"] + value["attention_share"] < 1


def test_a_missing_reference_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(references, "ENVIRONMENTS", tmp_path)
    with pytest.raises(ValueError, match=r"not there; make it with 'bash .*/scripts/references/setup\.sh openpi'"):
        denoise.start(denoise.REFERENCE, synthetic.sizes("pi0", "toy"), "float32", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "must be positive"),
        (["--prompt-tokens", "49"], "from 1 to 48"),
        (["--batch", "0"], "positive"),
    ],
)
def test_impossible_options_are_refused(options: list[str], message: str) -> None:
    result = bench("denoise", *options)
    assert result.code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_dying_process_is_reported() -> None:
    config = synthetic.sizes("pi0", "toy")
    with pytest.raises(ValueError, match="the process of dsrl_async ended with status"):
        denoise.start(denoise.OWN, {**config, "heads": 0}, "float32", 1)


def test_quantities_go_to_the_stage_that_is_open() -> None:
    reading = iter([0, 1, 11, 12, 112, 1112])
    meter = StageMeter(lambda: next(reading))
    for stage in ("vision", "prefill", "denoise", "denoise", "prefill"):
        meter.enter(stage)
    assert meter.totals == {"vision": 10, "prefill": 2, "denoise": 1100}


def test_every_stage_of_a_sample_is_timed_and_counted() -> None:
    config = synthetic.sizes("pi0", "toy")
    sample = load(config, "float32", 0)(synthetic.observation(config, [5], 0), 2)
    times, counts = time_stages(sample), count_operations(sample)
    assert all(milliseconds > 0 for milliseconds in times.values())
    assert all(kernels > 50 for kernels in counts["kernels"].values())
    longer = count_operations(load(config, "float32", 0)(synthetic.observation(config, [5], 0), 4))
    assert longer["kernels"]["denoise"] == pytest.approx(2 * counts["kernels"]["denoise"], rel=0.1)
    assert longer["kernels"]["vision"] == counts["kernels"]["vision"]


def result(scale: float, actions: float) -> dict[str, object]:
    times = [{"vision": v * scale, "prefill": 20.0 * scale, "denoise": 70.0 * scale} for v in (10.0, 1000.0, 11.0)]
    kernels = {"vision": 100, "prefill": 300, "denoise": 600}
    peak = int(2e9 * scale)
    return {"times": times, "kernels": kernels, "host_syncs": 0, "peak_memory": peak, "actions": [[[actions, 1.0]]]} | {
        "gemm_share": 0.5,
        "attention_share": 0.1,
    }


def test_medians_ratios_and_differences() -> None:
    results = {"dsrl_async": result(1.0, 0.25), "openpi": result(2.0, 0.5)}
    figures = {(system, metric): value for system, metric, value, *_ in denoise.summarise(results)}
    assert figures["dsrl_async", "vision"] == 11
    assert figures["dsrl_async", "total"] == 101
    assert figures["dsrl_async/openpi", "total"] == 0.5
    assert figures["dsrl_async", "kernels"] == 1000
    assert figures["openpi", "peak_memory"] == 4000
    assert ("dsrl_async/openpi", "host_syncs") not in figures
    assert figures["dsrl_async-openpi", "largest_difference"] == 0.25


def test_processes_alternate_where_memory_is_short() -> None:
    config = synthetic.sizes("pi0", "full")
    assert denoise.fit_together(["dsrl_async", "openpi"], config, "bfloat16", 20 * 2**30)
    assert not denoise.fit_together(["dsrl_async", "openpi"], config, "float32", 20 * 2**30)
    assert denoise.fit_together(["dsrl_async"], config, "float32", 20 * 2**30)


def test_cpu_time_leaves_out_what_a_process_waits() -> None:
    def sample(meter: StageMeter) -> torch.Tensor:
        meter.enter("denoise")
        time.sleep(0.05)
        return torch.zeros(1)

    assert MEASUREMENTS["time"](sample)["denoise"] >= 50
    assert MEASUREMENTS["cpu_time"](sample)["denoise"] < 25


@pytest.mark.parametrize(("together", "clock"), [(True, "wall"), (False, "wall"), (True, "cpu")])
def test_repeats_are_interleaved(together: bool, clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []

    class Fake:
        def __init__(self, system: str, *_: object) -> None:
            self.system = system

        def __enter__(self) -> Fake:
            events.append((self.system, "start"))
            return self

        def __exit__(self, *_: object) -> None:
            events.append((self.system, "stop"))

        def ask(self, do: str, **_: object) -> dict[str, object]:
            events.append((self.system, do))
            return {do: 1.0}

    monkeypatch.setattr(denoise, "start", Fake)
    monkeypatch.setattr(denoise, "fit_together", lambda *_: together)
    arguments = argparse.Namespace(repeats=3, steps=2, prompt_tokens=5, threads=1, clock=clock)
    results = denoise.measure(["a", "b"], synthetic.sizes("pi0", "toy"), "float32", 2, arguments)
    timed = [system for system, event in events if event == {"wall": "time", "cpu": "cpu_time"}[clock]]
    # a first sample of each process warms up
    assert timed == ["a", "b"] + ["a", "b"] * 3 if together else timed == ["a", "a", "b", "b"] * 3
    assert [len(results[system]["times"]) for system in "ab"] == [3, 3]
    assert len([event for _, event in events if event == "start"]) == (2 if together else 6)
    if not together:
        running = 0
        for _, event in events:
            running += {"start": 1, "stop": -1}.get(event, 0)
            assert running <= 1


def test_prompts_get_the_slots_that_they_need() -> None:
    def length(*lengths: int) -> int:
        return language_length(np.arange(48) < np.array(lengths)[:, None])

    assert [length(17), length(5, 24), length(25), length(48), length(1)] == [24, 24, 32, 48, 8]


def test_seeded_tensors_are_what_they_have_always_been() -> None:
    """The goldens stand on these numbers."""
    values = synthetic.uniform("noise/0", (50, 32), 0)
    assert hashlib.sha256(values.tobytes()).hexdigest().startswith("178519e95484187b")
    assert values.dtype == np.float32
    assert 0.9 < np.abs(values).max() <= 1
    assert not np.array_equal(values, synthetic.uniform("noise/1", (50, 32), 0))
    assert not np.array_equal(values, synthetic.uniform("noise/0", (50, 32), 1))


def test_observations_do_not_depend_on_the_other_rows() -> None:
    config = synthetic.sizes("pi0", "toy")
    three, two = (synthetic.observation(config, lengths, 0) for lengths in ([5, 17, 48], [5, 17]))
    for name, rows in two.items():
        assert np.array_equal(three[name][:2], rows), name
    assert three["token_mask"].sum(1).tolist() == [5, 17, 48]
    assert three["tokens"].max() < config["vocab_size"]


def output_arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_output_arguments(parser, repeats=3)
    return parser.parse_args(options)


def test_out_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out .*nowhere.* cannot be written: No such file"):
        JsonLines("denoise", output_arguments("--out", str(tmp_path / "nowhere" / "lines.jsonl")))


def test_the_same_lines_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = JsonLines("denoise", output_arguments("--out", str(tmp_path / "lines.jsonl")))
    lines.case("toy")
    lines.add([Figure("ours", "total", 1 / 3, "ms"), Figure("theirs", "total", 2.0, "ms", repeats=1)])
    printed = capsys.readouterr().out
    assert (tmp_path / "lines.jsonl").read_text() == printed
    first, second = map(json.loads, printed.splitlines())
    assert list(first) == ["benchmark", "case", "system", "metric", "value", "unit", "repeats", "load"]
    assert first["value"] == 0.333333
    assert (first["repeats"], second["repeats"]) == (3, 1)


def test_scale_notes_the_load_before_each_case_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[int] = []

    def measure(actors: int, arguments: argparse.Namespace) -> dict[str, float]:
        measured.append(actors)
        return {**dict.fromkeys(scale.UNITS, 0.0), "start": float(len(measured))}

    monkeypatch.setattr(scale, "measure", measure)
    monkeypatch.setattr("os.getloadavg", lambda: (float(len(measured)), 0.0, 0.0))
    scale.run(argparse.Namespace(actors=[8, 16], decisions=0, compression=1.0, repeats=3, out=None))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    starts = [(line["case"].split()[0], line["value"], line["load"]) for line in lines if line["metric"] == "start"]
    assert starts == [("8", 2.0, 0.0), ("16", 5.0, 3.0)]
