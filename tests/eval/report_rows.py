"""Rows with known numbers, and whole streams of made-up ones, for the tests of reports."""

from __future__ import annotations

import random

from ttaq.data.corruptions import CORRUPTIONS
from ttaq.eval.plan import domain_names
from ttaq.eval.rows import FORMAT, Row
from ttaq.eval.stream import Stream

DOMAINS = ("gaussian_noise", "fog", "contrast")
NETS = {"float": ("float", None, None), "W4A4": ("W4A4", "rtn(search=mse)", 0), "W8A8": ("W8A8", "rtn(search=mse)", 0)}


def domain_rows(
    method: str,
    seed: int,
    errors: list[float],
    net: str = "float",
    options: dict[str, object] | None = None,
    parts: list[dict[str, float]] | None = None,
    model: str = "resnet",
    **stream: object,
) -> list[Row]:
    """One cell, whole or (with fewer errors) in part.

    A domain has 100 images in a trace of ten stretches; its ECE is a tenth of its error, its class error one more. A
    part of it has 10 images.
    """
    scheme, quantization, calibration_seed = NETS[net]
    flags = Stream(**{"dataset": "digits", "corruptions": DOMAINS, "seed": seed, **stream})  # type: ignore[arg-type]
    names = domain_names(flags)
    return [
        {
            "format": FORMAT,
            "kind": "domain",
            "method": method,
            "options": options or {},
            "model": model,
            "scheme": scheme,
            "quantization": quantization,
            "calibration_seed": calibration_seed,
            "model_hash": f"hash of {net}",
            "stream": str(flags),
            "seed": seed,
            "versions": {"ttaq": "0"},
            "device": "cpu",
            "threads": 1,
            "domain": names[index],
            "index": index,
            "domains": len(names),
            "n": 100,
            "error": error,
            "class_error": error + 1,
            "ece": error / 10,
            "nonfinite": 0,
            "parts": {name: {"n": 10, "error": value} for name, value in (parts[index] if parts else {}).items()},
            "trace": {
                "n": [10] * 10,
                "wrong": [round(error * (k + 1) / 10) - round(error * k / 10) for k in range(10)],
            },
            "latency_ms": {"p50": 1.0, "p95": 2.0, "batches": 10},
            "memory": {"peak_mb": 100.0, "of": "test"},
            "counters": {},
        }
        for index, error in enumerate(errors)
    ]


def three_seeds() -> list[Row]:
    """Means over domains: source 20, 30, 40; tent 19, 28, 37."""
    rows: list[Row] = []
    for seed in range(3):
        rows += domain_rows("source", seed, [10.0 + 10 * seed, 20.0 + 10 * seed, 30.0 + 10 * seed])
        rows += domain_rows("tent", seed, [9.0 + 9 * seed, 19.0 + 9 * seed, 29.0 + 9 * seed])
    return rows


def made_up(
    methods: list[str], nets: list[str], seeds: int, latency: float = 20.0, stretches: int = 10, **stream: object
) -> list[Row]:
    """A whole stream as it could come out of a run: methods differ in level, domains in difficulty, all of it noisy."""
    rows: list[Row] = []
    draw = random.Random(0)
    level = {method: 0.75 - 0.35 * number / max(1, len(methods) - 1) for number, method in enumerate(methods)}
    for number, net in enumerate(nets):
        for place, method in enumerate(methods):
            for seed in range(seeds):
                everything = {"dataset": "cifar10", "corruptions": CORRUPTIONS, **stream}
                flags = Stream(seed=seed, **everything)  # type: ignore[arg-type]
                errors = [0.0] * len(domain_names(flags))
                cell = domain_rows(method, seed, errors, net, None, None, "cifar_resnet20", **everything)
                for row in cell:
                    hard = 0.5 + 0.5 * random.Random(row["domain"]).random()
                    error = [
                        min(0.98, (level[method] + 0.03 * number) * hard + draw.gauss(0, 0.02))
                        for _ in range(stretches)
                    ]
                    wrong = [min(200, max(0, round(200 * each))) for each in error]
                    percent = 100 * sum(wrong) / (200 * stretches)
                    row |= {"n": 200 * stretches, "error": percent, "class_error": percent + 0.4, "ece": percent / 3}
                    row |= {"trace": {"n": [200] * stretches, "wrong": wrong}}
                    time = latency * (1 + 2 * place) * (1 - 0.2 * number) + draw.gauss(0, 0.5)
                    row |= {"latency_ms": {"p50": time, "p95": 1.2 * time, "batches": stretches}}
                    peak = 800 + 150 * place + 40 * number + draw.gauss(0, 4)
                    row |= {"memory": {"peak_mb": peak, "of": "resident set of the process (VmHWM of this domain)"}}
                    if flags.setting == "mixed":
                        row["parts"] = {
                            f"{name}@5": {"n": 2000, "error": percent * (0.5 + random.Random(name).random())}
                            for name in flags.corruptions
                        }
                rows += cell
    return rows
