"""Transports: each carries decisions, and their figures are put side by side."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsrl_async.bench import references, transport
from dsrl_async.bench.simulated.environment import CHUNK, SPEC
from dsrl_async.bench.systems import bare_transport
from dsrl_async.bench.systems.transport_process import SYSTEMS


def process(system: str, gather: bool) -> dict[str, float]:
    asked = {"system": system, "environments": 3, "gather": gather, "warm_s": 0.1, "seconds": 0.2}
    command = [sys.executable, "-m", "dsrl_async.bench.systems.transport_process", json.dumps(asked)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.parametrize("system", list(SYSTEMS))
@pytest.mark.parametrize("gather", [True, False])
def test_every_transport_carries_decisions(system: str, gather: bool) -> None:
    figures = process(system, gather)
    assert figures["decisions"] > 10
    assert figures["seconds"] > 0.19
    assert 0 < figures["cpu_s"] < 4 * figures["seconds"]


def test_payloads_are_the_same_for_all() -> None:
    images = SPEC.cameras * SPEC.image_size**2 * 3 + 64 * 64 * 3
    assert images + SPEC.state_dim * 4 == bare_transport.PAYLOAD == 313_376
    assert (CHUNK, SPEC.action_dim) == bare_transport.ANSWER


@pytest.mark.parametrize("peer", transport.PEERS)
def test_peers(peer: str) -> None:
    if not (references.ENVIRONMENTS / peer.split()[0] / "complete").exists():
        pytest.skip("its environment is made by scripts/references/setup.sh")
    figures = transport.variants([peer])[peer](2, 3.0, 0.5)
    assert figures["decisions"] > 10
    assert figures["cpu_s"] > 0


def test_a_missing_peer_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(references, "ENVIRONMENTS", tmp_path)
    with pytest.raises(ValueError, match=r"not there; make it with 'bash .*/scripts/references/setup\.sh torchrl'"):
        transport.variants(["torchrl"])


def test_a_peer_that_fails_is_named_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    monkeypatch.setattr(transport, "peer_command", lambda peer: command)
    with pytest.raises(ValueError, match="gymnasium failed: no such thing"):
        transport.variants(["gymnasium"])["gymnasium"](1, 0.1, 0.1)


def figures(rate: float, cpu_us: float) -> list[transport.Metrics]:
    return [{"decisions": rate * 2, "seconds": 2.0, "cpu_s": cpu_us * 1e-6 * rate * 2}]


def test_ratios_are_to_the_best_peer_with_as_many_copies() -> None:
    samples = {
        "dsrl_async": figures(1000, 50),
        "dsrl_async, one copy": figures(2000, 40),
        "bare": figures(2000, 25),
        "bare, one copy": figures(4000, 20),
        "gymnasium": figures(250, 400),
        "gymnasium, one copy": figures(500, 200),
        "torchrl": figures(100, 100),
        "memcpy": figures(9000, 10),
    }
    found = {(system, metric): value for system, metric, value, *_ in transport.summarise(samples)}
    assert found["dsrl_async/gymnasium", "decisions_per_s"] == 4
    assert found["dsrl_async/torchrl", "cpu"] == pytest.approx(0.5)
    assert found["dsrl_async, one copy/gymnasium, one copy", "decisions_per_s"] == 4
    assert found["dsrl_async/bare", "cpu"] == pytest.approx(2)
    assert found["dsrl_async, one copy/bare", "cpu"] == pytest.approx(2)
    assert found["memcpy", "decisions_per_s"] == 9000


def test_own_processes_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    transport.add_arguments(parser)
    options = ["--system", "dsrl_async", "bare", "--environments", "2", "--seconds", "0.2", "--repeats", "1"]
    transport.run(parser.parse_args(options))
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["case"] for record in records} == {"2 environments"}
    systems = {"dsrl_async", "dsrl_async, one copy", "bare", "bare, one copy"}
    ratios = {"dsrl_async/bare", "dsrl_async, one copy/bare"}
    assert {record["system"] for record in records} == systems | ratios
    assert all(record["value"] > 0 for record in records)


def test_impossible_options_are_refused() -> None:
    parser = argparse.ArgumentParser()
    transport.add_arguments(parser)
    with pytest.raises(ValueError, match="must be positive"):
        transport.run(parser.parse_args(["--environments", "0"]))
