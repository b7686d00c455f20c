"""Percentiles of the times of batches, and their means."""

import pytest

from ttaq.eval.latency import Latency, mean_latency


def measured(steps: int) -> Latency:
    latency = Latency()
    for time in range(steps):
        latency.add(float(time), 0.25 * time)
    return latency


def test_percentiles_of_step_forward_and_update() -> None:
    assert measured(101).summary() == {
        "p50": 50,
        "p95": 95,
        "p99": 99,
        "batches": 101,
        "forward": {"p50": 37.5, "p95": 71.25, "p99": 74.25},
        "update": {"p50": 12.5, "p95": 23.75, "p99": 24.75},
    }


def test_goes_on_from_a_state() -> None:
    resumed = Latency()
    resumed.load_state_dict(measured(60).state_dict())
    for time in range(60, 101):
        resumed.add(float(time), 0.25 * time)
    assert resumed.summary() == measured(101).summary()


def test_means_are_over_what_all_have() -> None:
    new, old = measured(101).summary(), {"p50": 60.0, "p95": 97.0, "batches": 5}
    assert mean_latency([new, old]) == {"p50": 55, "p95": 96}
    assert mean_latency([new, measured(201).summary()]) == pytest.approx(
        {
            "p50": 75,
            "p95": 142.5,
            "p99": 148.5,
            "forward": pytest.approx({"p50": 56.25, "p95": 106.875, "p99": 111.375}),
            "update": pytest.approx({"p50": 18.75, "p95": 35.625, "p99": 37.125}),
        }
    )
