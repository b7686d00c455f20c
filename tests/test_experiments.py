"""The plans of the experiments: every arm is a setting that exists, and the rule decides as it is written."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    adaptation,
    adaptation_choice,
    adaptation_result,
    quantization,
    quantization_choice,
    quantization_result,
    rounds_result,
)
from ttaq.errors import CheckpointError
from ttaq.eval import Stream
from ttaq.ptq import METHODS as QUANTIZATION
from ttaq.ptq import settings_of
from ttaq.tta import METHODS, build

QUANTIZATION_PLAN = tomllib.loads(quantization.PLAN.read_text())
ADAPTATION_PLAN = tomllib.loads(adaptation.PLAN.read_text())


@pytest.mark.parametrize("section", QUANTIZATION_PLAN)
def test_every_arm_of_quantization_can_be_set(section: str) -> None:
    for arm, settings in quantization.arms([section], "batch_affine").items():
        options = {name: value for name, value in settings.items() if name != "method"}
        if arm == "float":
            continue
        assert settings["method"] in QUANTIZATION, arm
        settings_of(settings["method"], "fast", options)


def test_what_was_chosen_is_ttaq() -> None:
    arm = quantization.arms(["distillation"], "batch_affine_keep_1")["distillation"]
    chosen = settings_of("qdrop", "fast", {name: value for name, value in arm.items() if name != "method"})
    assert settings_of("ttaq", "fast") == chosen


def test_arms_are_told_apart_by_what_their_rows_say() -> None:
    names = [name for section in QUANTIZATION_PLAN.values() for name in section]
    arms = quantization.arms(names, "batch_affine_keep_1")
    assert len({quantization_choice.flags_of_arm(settings) for settings in arms.values()}) == len(arms)
    text = "qdrop(affine_lr=0.001,augment=0.5,calibration=1024xcifar10,keep_quantized=1.0,norm_statistics=batch)"
    assert quantization_choice.flags_of(text) == quantization_choice.flags_of_arm(arms["augment_half"])
    text = "ttaq(affine_lr=0.001,calibration=1024xcifar10,distillation=400,keep_quantized=1.0,norm_statistics=batch)"
    assert quantization_choice.flags_of(text) == quantization_choice.flags_of_arm(arms["distillation"])


BASE = {(scheme, seed): 20.0 for scheme in quantization_choice.SCHEMES for seed in range(3)}


@pytest.mark.parametrize(
    ("changes", "seeds", "said"),
    [
        ((-1.0, -0.5, -0.1), 3, "taken over"),
        ((-1.0, -0.5, 0.1), 3, "out"),
        ((-1.0,), 1, "open"),
        ((0.1,), 1, "out after seed 0"),
    ],
)
def test_the_rule_of_quantization(changes: tuple[float, ...], seeds: int, said: str) -> None:
    cells = {(scheme, seed): value + changes[seed] for (scheme, seed), value in BASE.items() if seed < seeds}
    assert quantization_choice.verdict(cells, BASE) == said
    del cells["W3A3", 0]
    assert quantization_choice.verdict(cells, BASE) == "seed 0 not complete"


def test_differences_are_paired_by_scheme_and_seed() -> None:
    cells = {("W2A4", 0): 19.0, ("W2A2", 0): 22.0, ("W2A2", 1): 23.0}
    assert quantization_choice.differences(cells, BASE) == {0: 0.5, 1: 3.0}


def test_every_method_and_arm_of_adaptation_exists() -> None:
    tables: dict[str, Any] = {name: table for name, table in ADAPTATION_PLAN.items() if name != "abl"}
    assert {method for table in tables.values() for method in table["methods"]} <= METHODS.keys()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    for arm in (*ADAPTATION_PLAN["abl"]["loss"], *ADAPTATION_PLAN["abl"]["answer"]):
        adapter = build("tent", net, **adaptation.options_of(arm, ADAPTATION_PLAN["abl"], "gradient_soft"))
        assert adapter(torch.rand(2, 3, 8, 8)).shape == (2, 3)


FLAGS = {
    "float": "",
    "qdrop": "search=mse",
    "distillation": "affine_lr=0.001,distillation=400,keep_quantized=1.0,norm_statistics=batch",
}


def rows_of_result(arm: str, scheme: str, errors: list[float]) -> list[dict[str, Any]]:
    cell = {"kind": "summary", "method": "norm", "scheme": scheme, "quantization": f"qdrop({FLAGS[arm]})"}
    return [cell | {"seed": seed, "error": error} for seed, error in enumerate(errors)]


def test_the_claim_is_paired_by_seed() -> None:
    rows = rows_of_result("float", "float", [20.0, 22.0, 24.0])
    rows += rows_of_result("qdrop", "W2A4", [30.0, 33.0, 36.0]) + rows_of_result("distillation", "W2A4", [29.0, 31.0])
    errors = quantization_result.errors_of(rows, "batch_affine_keep_1")
    assert quantization_result.schemes_of(errors) == ["W2A4"]
    lines = quantization_result.claim_table(errors, ["W2A4"], "distillation", "qdrop")
    assert lines[2] == "| W2A4 | norm | -1.50 ± 6.35 (n = 2) | +9.00 ± 0.00 (n = 2) |"
    with pytest.raises(SystemExit, match="two results for W2A4, qdrop, norm, seed 0"):
        quantization_result.errors_of([*rows, *rows_of_result("qdrop", "W2A4", [31.0])], "batch_affine_keep_1")


def test_arms_of_several_lengths_are_told_apart() -> None:
    rows = rows_of_result("qdrop", "W2A4", [30.0])
    assert [arm for _, arm, _ in quantization_result.errors_of(rows, "batch_affine_keep_1")] == ["qdrop"]
    for count in (4000, 400):
        cell = {"quantization": f"qdrop(iterations={count},search=mse)", "error": float(count)}
        rows.append(rows[0] | cell | {"seed": 1})
    errors = quantization_result.errors_of(rows[1:], "batch_affine_keep_1")
    assert {arm: [*seeds.values()] for (_, arm, _), seeds in errors.items()} == {
        "qdrop, 400 steps": [400.0],
        "qdrop, 4000 steps": [4000.0],
    }
    assert [arm for _, arm, _ in errors] == ["qdrop, 400 steps", "qdrop, 4000 steps"]


def rows_of_choice(stream: str, options: dict[str, Any], errors: list[float]) -> list[dict[str, Any]]:
    flags = {"iid": {}, "dirichlet01": {"delta": 0.1}, "tail": {"tail": 0.05}}[stream]
    cell = {"kind": "summary", "method": "tent", "scheme": "W4A4", "options": {"lr": 1e-3, **options}}
    return [
        cell | {"seed": seed, "class_error": error, "stream": str(Stream(dataset="digits", seed=seed, **flags))}
        for seed, error in enumerate(errors)
    ]


def test_the_rule_of_adaptation() -> None:
    rows = [row for name in ("iid", "dirichlet01", "tail") for row in rows_of_choice(name, {}, [20.0, 30.0])]
    good, costly = {"abl": "gradient"}, {"abl": "frequency", "abl_loss": "hard"}
    rows += rows_of_choice("iid", good, [20.25, 30.25]) + rows_of_choice("tail", good, [19.0, 29.0])
    errors = adaptation_choice.errors_of(rows)
    assert adaptation_choice.change(errors, "gradient_soft", "iid") == 0.25
    assert adaptation_choice.figure(errors, "gradient_soft") is None
    rows += rows_of_choice("dirichlet01", good, [18.0, 30.0])
    for stream, change in (("iid", 0.5), ("dirichlet01", -5.0), ("tail", -5.0)):
        rows += rows_of_choice(stream, costly, [20 + change, 30 + change])
    errors = adaptation_choice.errors_of(rows)
    assert adaptation_choice.figure(errors, "gradient_soft") == -1.0
    assert adaptation_choice.figure(errors, "frequency_hard") == -5.0
    assert adaptation_choice.chosen(errors, ["gradient_soft", "frequency_hard"]) == "gradient_soft"
    left = {"abl": "inverse"}
    early = [row for name in ("iid", "dirichlet01", "tail") for row in rows_of_choice(name, left, [10.0])]
    errors = adaptation_choice.errors_of([*rows, *early])
    assert adaptation_choice.figure(errors, "inverse_soft") == -10.0
    assert adaptation_choice.chosen(errors, ["gradient_soft", "inverse_soft"]) == "gradient_soft"
    for stream in ("iid", "dirichlet01", "tail"):
        rows += rows_of_choice(stream, good | {"abl_answer": 1.0}, [15.0])
    assert adaptation_choice.figure(adaptation_choice.errors_of(rows), "gradient_soft+answer_1") == -5.0


def rows_of_adaptation(
    method: str, errors: list[float], quantized: str | None = None, **own: Any
) -> list[dict[str, Any]]:
    row = {"method": method, "options": {}, "counters": {"updates": 0}, "quantization": quantized}
    row |= {"model": "cifar_resnet20", "scheme": "W4A4" if quantized else "float"} | own
    found = []
    for seed, error in enumerate(errors):
        own_stream = row | {"seed": seed, "stream": str(Stream(dataset="digits", seed=seed))}
        domains = (("snow@5", error - 1), ("fog@5", error + 1), ("clean", error / 10))
        for index, (domain, of_domain) in enumerate(domains):
            found.append(own_stream | {"kind": "domain", "domain": domain, "index": index, "error": of_domain})
        found.append(own_stream | {"kind": "summary", "error": 0.7 * error})
    return found


def test_the_tables_of_adaptation_are_paired_by_seed(tables: Any) -> None:
    ttaq, learns = f"qdrop({FLAGS['distillation']})", {"counters": {"updates": 3}, "guards": {"drift": 0.5}}
    rows = rows_of_adaptation("tent", [19.0, 22.0], **learns)
    rows += rows_of_adaptation("tent", [18.5, 23.5], options={"abl": "gradient"}, **learns)
    rows += rows_of_adaptation("norm", [20.0, 22.0]) + rows_of_adaptation("norm", [25.0, 31.0], ttaq)
    rows += rows_of_adaptation("tent", [40.0], counters={"updates": 3})
    assert tables(rows) == [
        "| error, % | float | W4A4 ttaq |",
        "|---|---:|---:|",
        "| `tent` | 20.50 ± 19.06 (n = 2) | not run |",
        "| `tent`, gradient_soft | 21.00 ± 31.77 (n = 2) | not run |",
        "| `norm` | 21.00 ± 12.71 (n = 2) | 28.00 ± 38.12 (n = 2) |",
        "| `tent, no guards` | 40.00 (n = 1) | not run |",
        "",
        "| minus `norm` | float |",
        "|---|---:|",
        "| `tent` | -0.50 ± 6.35 (n = 2) |",
        "| `tent, no guards` | +20.00 (n = 1) |",
        "",
        "| minus the same without ABL | float |",
        "|---|---:|",
        "| `tent`, gradient_soft | +0.50 ± 12.71 (n = 2) |",
        "",
        "| mean of these | cells | change |",
        "|---|---:|---:|",
        "| gradient_soft | 1 | +0.50 ± 12.71 (n = 2) |",
    ]
    rows += rows_of_adaptation("norm", [24.0], ttaq, options={"abl": "gradient"})
    assert tables(rows)[-1] == "| gradient_soft | 1 | +0.50 ± 12.71 (n = 2) |"
    rows += rows_of_adaptation("norm", [24.0, 30.0], ttaq, options={"abl": "gradient"})[4:]
    assert tables(rows)[-1] == "| gradient_soft | 2 | -0.25 ± 6.35 (n = 2) |"
    several = tables(rows, "--baseline", "norm,tent")
    assert [line[:17] for line in several if line.startswith("| minus")] == [
        "| minus `norm` | ",
        "| minus `tent` | ",
        "| minus the same ",
    ]
    with pytest.raises(SystemExit, match="no row is of 'sar' without ABL, only of norm, tent"):
        tables(rows, "--baseline", "norm,sar")
    found = adaptation_result.cells_of(rows, "error", adaptation_result.is_clean)
    assert found["float", ("tent", "off")] == {0: 1.9, 1: 2.2}
    across = tables(rows_of_adaptation("norm", [1.0]) + rows_of_adaptation("norm", [2.0], ttaq))
    assert across == ["| error, % | `norm` |", "|---|---:|", "| float | 1.00 (n = 1) |", "| W4A4 ttaq | 2.00 (n = 1) |"]
    rates = [
        row for lr in (0.1, 0.0) for row in rows_of_adaptation("tent", [10.0 + lr], options={"lr": lr, "momentum": 0.9})
    ]
    assert [line for line in tables(rates) if "lr" in line] == [
        "| `tent, lr=0.1` | 10.10 (n = 1) |",
        "| `tent, lr=0.0` | 10.00 (n = 1) |",
    ]
    other = rows_of_adaptation("norm", [3.0], model="deit_tiny")
    assert tables(rows_of_adaptation("norm", [1.0]) + other)[2:] == [
        "| cifar_resnet20 float | 1.00 (n = 1) |",
        "| deit_tiny float | 3.00 (n = 1) |",
    ]


def test_quantizations_are_compared_within_a_scheme(tables: Any) -> None:
    ttaq = f"qdrop({FLAGS['distillation']})"
    rows = rows_of_adaptation("norm", [20.0]) + rows_of_adaptation("norm", [25.0, 31.0], ttaq)
    rows += rows_of_adaptation("norm", [26.0, 34.0], "rtn") + rows_of_adaptation("norm", [50.0], "rtn", scheme="W2A4")
    assert tables(rows, "--versus", "ttaq")[-3:] == [
        "| minus ttaq | W4A4 rtn |",
        "|---|---:|",
        "| `norm` | +2.00 ± 12.71 (n = 2) |",
    ]
    with pytest.raises(SystemExit, match="no two models of one scheme, one of them by 'qdrop', only float, W4A4 ttaq"):
        tables(rows, "--versus", "qdrop")


@pytest.fixture
def tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lines that the command prints of rows."""

    def lines(rows: list[dict[str, Any]], *flags: str) -> list[str]:
        monkeypatch.setattr(adaptation_result, "read_rows", lambda _: rows)
        picture = tmp_path / "picture.png"
        adaptation_result.main(["rows.jsonl", "--plot", str(picture), *flags])
        assert picture.stat().st_size > 5000
        return capsys.readouterr().out.splitlines()

    return lines


def test_rounds_are_paired_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    rows = []
    for method, options, rounds in (
        ("norm", {}, ([20.0, 30.0], [20.0, 30.0])),
        ("tent", {}, ([18.0, 29.0], [22.0, 31.0])),
        ("tent", {"abl": "gradient"}, ([18.0, 27.0], [16.0, 27.0])),
    ):
        for number, errors in enumerate(rounds):
            for row in rows_of_adaptation(method, errors, options=options, counters={}):
                again = (
                    {"domain": f"{row['domain']}#2", "index": 3 + row["index"]} if number and "domain" in row else {}
                )
                rows.append(row | again)
    monkeypatch.setattr(rounds_result, "read_rows", lambda _: rows)
    rounds_result.main(["rows.jsonl", "--baseline", "norm", "--plot", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert capsys.readouterr().out.splitlines() == [
        "| error, % | `norm` | `tent` | `tent`, gradient_soft |",
        "|---|---:|---:|---:|",
        "| round 1 | 25.00 ± 63.53 (n = 2) | 23.50 ± 69.88 (n = 2) | 22.50 ± 57.18 (n = 2) |",
        "| round 2 | 25.00 ± 63.53 (n = 2) | 26.50 ± 57.18 (n = 2) | 21.50 ± 69.88 (n = 2) |",
        "",
        "| minus `norm` | `tent` | `tent`, gradient_soft |",
        "|---|---:|---:|",
        "| round 1 | -1.50 ± 6.35 (n = 2) | -2.50 ± 6.35 (n = 2) |",
        "| round 2 | +1.50 ± 6.35 (n = 2) | -3.50 ± 6.35 (n = 2) |",
        "",
        "| minus the same without ABL | `tent`, gradient_soft |",
        "|---|---:|",
        "| round 1 | -1.00 ± 12.71 (n = 2) |",
        "| round 2 | -5.00 ± 12.71 (n = 2) |",
    ]
    with pytest.raises(SystemExit, match="no row is of 'sar'"):
        rounds_result.main(["rows.jsonl", "--baseline", "sar"])


def test_rows_of_adaptation_that_do_not_belong_together_are_refused() -> None:
    rows = rows_of_adaptation("norm", [20.0])
    with pytest.raises(CheckpointError, match="two results for float, norm, off, seed 0"):
        adaptation_result.cells_of([*rows, *rows_of_adaptation("norm", [21.0])], "error")
    other = rows[0] | {"stream": str(Stream(dataset="digits", delta=0.1))}
    with pytest.raises(CheckpointError, match="no finished stream"):
        adaptation_result.cells_of(rows[:-1], "error")
    with pytest.raises(CheckpointError, match="none of the domains"):
        adaptation_result.cells_of(
            [row for row in rows if row.get("domain") != "clean"], "error", adaptation_result.is_clean
        )
    with pytest.raises(CheckpointError, match="different streams"):
        adaptation_result.cells_of([*rows, other], "error")
