"""Tables and pictures from rows with known numbers."""

import json
import re
from pathlib import Path

import pytest

from ttaq.errors import CheckpointError, DataError
from ttaq.eval.markdown import markdown, table
from ttaq.eval.plot import plot
from ttaq.eval.report import build_report
from ttaq.eval.rows import Row
from ttaq.eval.stream import Stream

DOMAINS = ("gaussian_noise", "fog", "contrast")
NETS = {"float": ("float", None, None), "W4A4": ("W4A4", "rtn(search=mse)", 0)}


def domain_rows(
    method: str,
    seed: int,
    errors: list[float],
    net: str = "float",
    options: dict[str, object] | None = None,
    **stream: object,
) -> list[Row]:
    """One cell, whole or (with fewer errors) in part; its ECE is a tenth of its error."""
    scheme, quantization, calibration_seed = NETS[net]
    text = str(Stream(**{"dataset": "digits", "corruptions": DOMAINS, "seed": seed, **stream}))  # type: ignore[arg-type]
    return [
        {
            "format": 1,
            "kind": "domain",
            "method": method,
            "options": options or {},
            "model": "resnet",
            "scheme": scheme,
            "quantization": quantization,
            "calibration_seed": calibration_seed,
            "model_hash": f"hash of {net}",
            "stream": text,
            "seed": seed,
            "versions": {"ttaq": "0"},
            "device": "cpu",
            "threads": 1,
            "domain": DOMAINS[index],
            "index": index,
            "n": 10,
            "error": error,
            "ece": error / 10,
            "latency_ms": {"p50": 1.0, "p95": 2.0, "batches": 1},
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


def test_means_and_paired_differences() -> None:
    report = build_report(three_seeds())
    source, tent = report.entries["resnet, float", "source"], report.entries["resnet, float", "tent"]
    mean = source.mean()
    assert mean is not None
    assert (mean.mean, mean.n) == (30.0, 3)
    assert mean.half == pytest.approx(4.302653 * 10 / 3**0.5, rel=1e-6)
    # The differences are -1, -2, -3: far tighter than the two intervals, which is what pairing is for.
    difference = tent.against(source)
    assert difference is not None
    assert difference.mean == pytest.approx(-2.0)
    assert difference.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    fog = tent.domain(1)
    assert fog is not None
    assert fog.mean == pytest.approx(28.0)


def test_markdown_shows_what_it_claims() -> None:
    text = markdown(build_report(three_seeds()))
    assert "| tent   | 28.00 ± 22.36 | -2.00 ± 2.48 |" in text
    assert "| **mean**       | 30.00 ± 24.84 | 28.00 ± 22.36 |" in text
    assert "seeds 0, 1, 2" in text
    assert " seed=" not in text
    assert "ttaq 0; cpu, 1 threads" in text
    summary = next(line for line in text.splitlines() if line.startswith("| tent "))
    assert summary.rstrip(" |").endswith("3")


def test_one_seed_has_no_interval_and_says_so() -> None:
    text = markdown(build_report(domain_rows("source", 0, [1.0, 2.0, 3.0])))
    assert "±" not in text.split("##")[1]
    assert "a single seed has none" in text


def test_groups_stand_apart_and_what_was_not_run_says_so() -> None:
    rows = [*three_seeds(), *domain_rows("source", 0, [50.0, 60.0, 70.0], net="W4A4")]
    report = build_report(rows)
    assert report.groups == ("resnet, float", "resnet, W4A4, rtn(search=mse)")
    text = markdown(report).split("## resnet, W4A4")[1]
    assert re.search(r"\| tent +\| +not run", text)
    assert "- source, seed 1: not run" in text
    assert "calibration seed 0 for every stream seed" in text


def test_an_unfinished_cell_is_in_no_figure() -> None:
    rows = [*three_seeds(), *domain_rows("norm", 0, [0.0, 0.0])]
    text = markdown(build_report(rows))
    assert "- norm, seed 0: 2 of 3 domains, in no figure" in text
    assert re.search(r"\| norm +\| +incomplete", text)


def test_variants_of_a_method_are_named_by_what_differs() -> None:
    rows = [
        *domain_rows("source", 0, [1.0, 2.0, 3.0]),
        *domain_rows("tent", 0, [1.0, 2.0, 3.0], options={"lr": 0.1, "optimizer": "sgd"}),
        *domain_rows("tent", 0, [1.0, 2.0, 3.0], options={"lr": 0.2, "optimizer": "sgd"}),
    ]
    assert build_report(rows).methods == ("source", "tent (lr=0.1)", "tent (lr=0.2)")


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("severity", 3, r"severity \(5 against 3\)"),
        ("batch_size", 64, r"batch_size \(200 against 64\)"),
        ("images", 7, r"images \(all against 7\)"),
        ("split", "validate", r"split \(report against validate\)"),
        (
            "corruptions",
            ("fog", "contrast", "frost"),
            r"corruptions \(gaussian_noise,fog,contrast against fog,contrast,frost\)",
        ),
        ("setting", "reset_each_shift", r"setting \(continual against reset_each_shift\)"),
    ],
)
def test_rows_of_different_streams_are_not_mixed(flag: str, value: object, says: str) -> None:
    rows = [*domain_rows("source", 0, [1.0, 2.0, 3.0]), *domain_rows("tent", 0, [1.0, 2.0, 3.0], **{flag: value})]
    with pytest.raises(CheckpointError, match=says):
        build_report(rows)


def test_frost_of_another_source_is_another_stream() -> None:
    first, second = (
        domain_rows("source", 0, [1.0], corruptions=("frost",), frost=frost) for frost in ("textures", "procedural")
    )
    with pytest.raises(CheckpointError, match=r"frost \(textures against procedural\)"):
        build_report([*first, *second])


def changed(rows: list[Row], **changes: object) -> list[Row]:
    return [{**row, **changes} for row in rows]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no finished domain"),
        (domain_rows("tent", 0, [1.0, 2.0, 3.0]), "no rows of the baseline 'source', the files have: tent"),
        (
            [*domain_rows("source", 0, [1.0]), *changed(domain_rows("source", 0, [1.0]), model_hash="other")],
            r"two models \(hash of floa and other\)",
        ),
        (
            [*domain_rows("source", 0, [1.0]), *domain_rows("source", 0, [2.0])],
            "two different results for gaussian_noise",
        ),
    ],
)
def test_rows_that_make_no_table(rows: list[Row], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        build_report(rows)


def test_the_same_row_twice_counts_once() -> None:
    rows = three_seeds()
    assert markdown(build_report([*rows, *json.loads(json.dumps(rows))])) == markdown(build_report(rows))


def test_table_is_aligned() -> None:
    assert table(["a", "bb"], [["long", "1"]]).splitlines() == ["| a    | bb |", "|------|---:|", "| long |  1 |"]


def test_plot_has_marks_of_every_method(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "plot.png"
    plot(build_report([*three_seeds(), *domain_rows("tent", 0, [50.0, 60.0, 70.0], net="W4A4")]), path)
    pixels = image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 300
    for colour in ("#000000", "#0072B2"):
        wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        assert (abs(pixels - wanted).max(-1) < 0.02).sum() > 50, f"no mark in {colour}"


def test_plot_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = build_report(three_seeds())
    for path in (tmp_path / "missing" / "plot.png", tmp_path / "plot.nonsense"):
        with pytest.raises(DataError, match="cannot write"):
            plot(report, path)
