"""Rows and weights of groups: what the benchmark measures arrives, and its figures are per row and per frame."""

from __future__ import annotations

import argparse

import pytest

from dsrl_async.bench import groups


def test_rows_and_weights_arrive_and_are_counted() -> None:
    sample = groups.measure_rows("tcp", 4, 0.3)
    assert sample["rows"] > 10
    assert 0 < sample["uplink"] < 1
    assert 0 < sample["downlink"] < 1
    sample = groups.measure_weights("ipc", 2, 0.1, 0.5)
    assert 1 <= sample["published"] <= 10
    assert 0 < sample["groups"] < 1


def test_figures_are_medians_per_row_and_per_frame() -> None:
    rows = [{"rows": 1000.0, "seconds": 2.0, "uplink": each * 1e-3, "downlink": 0.02} for each in (10, 30, 20)]
    found = {(system, metric): value for system, metric, value, *_ in groups.summarise_rows(rows)}
    assert found["uplink", "cpu"] == pytest.approx(20)
    assert found["downlink", "cpu"] == pytest.approx(20)
    assert found["both", "cpu"] == pytest.approx(40)
    assert found["both", "rows_per_s"] == 500
    frames = groups.summarise_weights([{"published": 10, "taken": 40, "publisher": 0.5, "groups": 0.2}])
    assert {system: value for system, _, value, *_ in frames} == {
        "publisher": pytest.approx(50),
        "each group": pytest.approx(5),
    }


def test_a_message_that_cannot_be_is_refused() -> None:
    parser = argparse.ArgumentParser()
    groups.add_arguments(parser)
    with pytest.raises(ValueError, match="--rows must not be above 167"):
        groups.run(parser.parse_args(["--rows", "168"]))
