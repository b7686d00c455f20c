"""Tables from rows with known numbers."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from report_rows import DOMAINS, domain_rows, made_up, three_seeds

from ttaq.cli import main
from ttaq.errors import CheckpointError
from ttaq.eval.csv_table import csv_table
from ttaq.eval.markdown import markdown
from ttaq.eval.report import build_report
from ttaq.eval.rows import Row
from ttaq.eval.table import table


def test_means_and_paired_differences() -> None:
    report = build_report(three_seeds())
    source, tent = report.entries["resnet, float", "source"], report.entries["resnet, float", "tent"]
    mean = source.mean()
    assert (mean.mean, mean.n) == (30.0, 3)
    assert mean.half == pytest.approx(4.302653 * 10 / 3**0.5, rel=1e-6)
    # The differences are -1, -2, -3: far tighter than the two intervals, which is what pairing is for.
    difference = tent.against(source)
    assert difference is not None
    assert difference.mean == pytest.approx(-2.0)
    assert difference.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert tent.by_line(report.lines)["fog"].mean == pytest.approx(28.0)


def test_markdown_shows_what_it_claims() -> None:
    text = markdown(build_report(three_seeds()))
    assert "| tent   | 28.00 ± 22.36 | -2.00 ± 2.48 | 29.00 ± 22.36 | 2.80 ± 2.24 |" in text
    assert "negative is better" in text
    assert "In the tables by domain" not in text  # Each line is a domain.
    assert "Between schemes" not in text
    assert "| **mean**       | 30.00 ± 24.84 | 28.00 ± 22.36 |" in text
    assert "seeds 0, 1, 2" in text
    assert " seed=" not in text
    assert "ttaq 0; cpu, 1 threads" in text
    summary = next(line for line in text.splitlines() if line.startswith("| tent "))
    assert summary.rstrip(" |").endswith("3")


def test_one_seed_has_no_interval_and_says_so() -> None:
    rows = [*domain_rows("source", 0, [1.0, 2.0, 3.0]), *domain_rows("tent", 0, [0.0, 2.0, 3.0])]
    text = markdown(build_report([*rows, *domain_rows("tent", 0, [3.0, 3.0, 3.0], net="W4A4")]))
    assert "±" not in text.split("##", 1)[1]
    assert "a single seed has none" in text
    assert re.search(r"\| tent +\| +1\.67 \| +-0\.33 \(n = 1\)", text)
    assert re.search(r"rtn\(search=mse\) \| not run \| \+1\.33 \(n = 1\) \| 1 \|", text)


def test_a_difference_over_other_seeds_than_the_line_says_so() -> None:
    rows = [row for row in three_seeds() if (row["method"], row["seed"]) != ("source", 2)]
    text = markdown(build_report(rows))
    assert re.search(r"\| tent +\|.*-1\.50 ± 6\.35 \(n = 2\).*\| 3 \|", text)
    only = [row for row in rows if row["method"] == "source" or row["seed"] == 2]
    assert "no common seed" in markdown(build_report(only))


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
    assert re.search(r"\| \*\*mean\*\* .*\| incomplete \|", text)
    assert "not run |" not in text
    alone = markdown(build_report([*domain_rows("source", 0, [1.0]), *domain_rows("tent", 0, [1.0, 2.0, 3.0])]))
    assert re.search(r"\| tent +\| +2\.00 \| +incomplete \|", alone)
    nets = [*domain_rows("source", 0, [1.0], net="W4A4"), *domain_rows("source", 0, [1.0, 2.0, 3.0])]
    assert re.search(r"rtn\(search=mse\) \| incomplete \| 0 \|", between(markdown(build_report(nets))))
    assert "norm" not in csv_table(build_report(rows))


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


def test_files_of_different_streams_are_to_be_reported_separately(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for severity in (5, 3):
        rows = domain_rows("source", 0, [1.0, 2.0, 3.0], severity=severity)
        (tmp_path / f"{severity}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path / "5.jsonl"), str(tmp_path / "3.jsonl")]) == 1
    said = capsys.readouterr().err
    assert (
        "different streams cannot be compared: severity (5 against 3); report each stream in a call of its own" in said
    )


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
        (
            [*domain_rows("source", 0, [1.0]), *changed(domain_rows("tent", 0, [1.0]), n=99)],
            "seed 0 has two different domains in place 0: gaussian_noise of 100 images in 3 domains, and "
            "gaussian_noise of 99 in 3",
        ),
    ],
)
def test_rows_that_make_no_table(rows: list[Row], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        build_report(rows)


def test_the_same_row_twice_counts_once() -> None:
    rows = three_seeds()
    assert markdown(build_report([*rows, *json.loads(json.dumps(rows))])) == markdown(build_report(rows))


def three_nets(**stream: object) -> list[Row]:
    """Three seeds; against float, W8A8 is 1, 2, 3 higher with tent, W4A4 ten times that."""
    rows: list[Row] = []
    for seed in range(3):
        for net, more in (("W4A4", 10.0), ("float", 0.0), ("W8A8", 1.0)):
            for method in ("source", "tent"):
                error = 10.0 + 3 * seed + (more * (seed + 1) if method == "tent" else 0.0)
                rows += domain_rows(method, seed, [error] * 3, net, **stream)  # type: ignore[arg-type]
    return rows


def between(text: str) -> str:
    return text.split("## Between schemes")[1]


def test_groups_are_compared_with_the_float_one() -> None:
    text = between(markdown(build_report(three_nets())))
    assert "minus that of **resnet, float** under the same method" in text
    assert "Negative is better" in text
    assert "| resnet, W4A4, rtn(search=mse) | +0.00 ± 0.00 | +20.00 ± 24.84 | 3 |" in text
    assert "| resnet, W8A8, rtn(search=mse) | +0.00 ± 0.00 |   +2.00 ± 2.48 | 3 |" in text


def test_the_baseline_group_can_be_chosen() -> None:
    text = between(markdown(build_report(three_nets(), baseline_group="W8A8")))
    assert "minus that of **resnet, W8A8, rtn(search=mse)**" in text
    assert "| resnet, W4A4, rtn(search=mse) | +0.00 ± 0.00 | +18.00 ± 22.36 | 3 |" in text
    assert re.search(r"\| resnet, float +\| \+0\.00 ± 0\.00 \| +-2\.00 ± 2\.48 \|", text)
    without_float = [row for row in three_nets() if row["scheme"] != "float"]
    assert "minus that of **resnet, W4A4" in markdown(build_report(without_float))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (
            "W2A2",
            "no group is named 'W2A2', the files have: resnet, W4A4, rtn(search=mse); resnet, float; resnet, W8A8",
        ),
        ("rtn", "'rtn' is ambiguous, it fits resnet, W4A4, rtn(search=mse); resnet, W8A8, rtn(search=mse); give more"),
    ],
)
def test_a_baseline_group_that_is_not_one(wanted: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(says)):
        build_report(three_nets(), baseline_group=wanted)


def test_architectures_are_not_compared() -> None:
    rows = [*three_nets(), *three_nets(model="vit"), *three_seeds_of("mobilenet")]
    report = build_report(rows, baseline_group="W8A8")
    assert report.comparisons == {
        f"{model}, W8A8, rtn(search=mse)": (f"{model}, W4A4, rtn(search=mse)", f"{model}, float")
        for model in ("resnet", "vit")
    }
    # The full name of a group is enough even where it is part of others' names; other families keep their default.
    report = build_report(rows, baseline_group="vit, W8A8, rtn(search=mse)")
    assert [*report.comparisons] == ["resnet, float", "vit, W8A8, rtn(search=mse)"]


def three_seeds_of(model: str) -> list[Row]:
    return changed(three_seeds(), model=model)


def by_domain(text: str) -> str:
    """The first table of errors by domain."""
    return "\n".join(next(part for part in text.split("\n\n") if part.startswith("| error %")).splitlines()[2:])


def labels(rows: list[Row]) -> list[str]:
    return [line.split("|")[1].strip() for line in by_domain(markdown(build_report(rows))).splitlines()]


def test_a_gradual_stream_has_a_line_per_corruption() -> None:
    errors = [float(k) for k in range(27)]
    text = markdown(build_report(domain_rows("source", 0, errors, setting="gradual")))
    assert by_domain(text).splitlines()[5].startswith("| gaussian_noise@4- |")  # 27 domains: each has a line.
    corruptions = (*DOMAINS, "snow", "frost")
    rows = domain_rows("source", 0, [float(k) for k in range(45)], setting="gradual", corruptions=corruptions)
    text = markdown(build_report(rows))
    assert "a line is one corruption, the mean over all its domains." in text
    assert [line.split()[1:4:2] for line in by_domain(text).splitlines()] == [
        ["gaussian_noise", "4.00"],
        ["fog", "13.00"],
        ["contrast", "22.00"],
        ["snow", "31.00"],
        ["frost", "40.00"],
        ["**mean**", "22.00"],
    ]


def test_a_stream_in_rounds_has_a_line_per_round() -> None:
    rows = domain_rows("source", 0, [float(k) for k in range(45)], rounds=15)
    assert labels(rows) == [*(f"round {number}" for number in range(1, 16)), "**mean**"]
    assert by_domain(markdown(build_report(rows))).splitlines()[14].split()[-2] == "43.00"
    # More rounds than lines: the corruptions.
    assert labels(domain_rows("source", 0, [1.0] * 123, rounds=41)) == [*DOMAINS, "**mean**"]
    # Rounds of one corruption are not rounds to a reader: with 41 domains, tenths of the stream.
    assert labels(domain_rows("source", 0, [1.0] * 41, rounds=41, corruptions=("fog",)))[0] == "0-10 %"


def test_a_walk_has_a_line_per_tenth() -> None:
    rows = [
        row
        for seed in (0, 1)
        for row in domain_rows("source", seed, [float(k // 5) for k in range(50)], setting="ccc", length=50)
    ]
    assert len({row["domain"] for row in rows}) > 50  # Each seed walks another way.
    text = markdown(build_report(rows))
    assert "the mean over one of 10 successive parts of the stream's 50 domains" in text
    lines = by_domain(text).splitlines()
    assert lines[3].split()[1:5] == ["30-40", "%", "|", "3.00"]
    assert len(lines) == 11
    # A short walk with one seed has names, but those of two seeds cannot share lines.
    short = [domain_rows("source", seed, [1.0] * 4, setting="ccc", length=4) for seed in (0, 1)]
    assert ">" in labels(short[0])[0]
    assert labels(short[0] + short[1]) == ["0-25 %", "25-50 %", "50-75 %", "75-100 %", "**mean**"]


def test_a_mixed_stream_has_a_line_per_part() -> None:
    rows = [
        row
        for seed in (0, 1)
        for row in domain_rows("source", seed, [50.0], parts=[{"fog@5": 40.0 + seed, "snow@5": 60.0}], setting="mixed")
    ]
    text = markdown(build_report(rows))
    assert "a line is one corruption of the mixed stream" in text
    assert [re.split(r" *\| *", line)[1:3] for line in by_domain(text).splitlines()] == [
        ["fog@5", "40.50 ± 6.35"],
        ["snow@5", "60.00 ± 0.00"],
        ["**all images**", "50.00 ± 0.00"],
    ]


def test_parts_of_several_domains_are_weighted_by_their_images() -> None:
    rows = domain_rows("source", 0, [1.0, 2.0], parts=[{"fog@5": 10.0}, {"fog@5": 40.0}], setting="mixed", rounds=2)
    rows[1]["parts"]["fog@5"]["n"] = 20
    assert by_domain(markdown(build_report(rows))).splitlines()[0].split() == ["|", "fog@5", "|", "30.00", "|"]


def test_csv_holds_what_the_rows_hold() -> None:
    rows = made_up(["source", "tent"], ["W4A4", "float"], 2, corruptions=DOMAINS)
    lines = [*csv.DictReader(io.StringIO(csv_table(build_report(rows))))]
    assert len(lines) == len(rows) == 2 * 2 * 2 * 3
    by_key = {(row["scheme"], row["method"], str(row["seed"]), row["domain"]): row for row in rows}
    assert len(by_key) == len(rows)
    for line in lines:
        row = by_key[line["scheme"], line["method"], line["seed"], line["domain"]]
        for key in ("error", "class_error", "ece"):
            assert float(line[key]) == row[key]
        for key in ("n", "index", "domains", "threads", "nonfinite", "stream", "model_hash", "device", "model"):
            assert line[key] == str(row[key])
        assert (float(line["latency_p50_ms"]), float(line["latency_p95_ms"])) == (
            row["latency_ms"]["p50"],
            row["latency_ms"]["p95"],
        )
        assert (float(line["memory_peak_mb"]), line["memory_of"]) == (row["memory"]["peak_mb"], row["memory"]["of"])
        assert json.loads(line["options"]) == row["options"]
        assert line["calibration_seed"] == ("" if row["scheme"] == "float" else "0")
        assert line["group"] in ("cifar_resnet20, W4A4, rtn(search=mse)", "cifar_resnet20, float")


def test_csv_documents_its_header() -> None:
    header = csv_table(build_report(three_seeds())).partition("\n")[0].split(",")
    documented = re.findall(r"`(\w+)`", csv_table.__doc__ or "")
    assert documented == header


def test_csv_leaves_empty_what_was_not_measured() -> None:
    rows = changed(domain_rows("source", 0, [1.0, 2.0, 3.0]), memory={"peak_mb": None, "of": "not measured"})
    line = next(csv.DictReader(io.StringIO(csv_table(build_report(rows)))))
    assert line["memory_peak_mb"] == ""


def test_csv_has_the_parts_of_latency_and_memory_where_rows_have_them() -> None:
    (row, *rest) = domain_rows("tent", 0, [9.0, 19.0, 29.0])
    row["latency_ms"] |= {"p99": 3.0, "forward": {"p50": 0.5, "p95": 1.5, "p99": 2.5}}
    row["memory"]["weights_mb"] = 1.25
    row["counters"] = {"alarms": 2}
    first, second, _ = csv.DictReader(io.StringIO(csv_table(build_report([row, *rest], "tent"))))
    names = ("latency_p99_ms", "forward_p50_ms", "forward_p99_ms", "update_p50_ms", "weights_mb", "state_mb", "alarms")
    assert [first[name] for name in names] == ["3.0", "0.5", "2.5", "", "1.25", "", "2"]
    assert [second[name] for name in names] == [""] * 7


def test_table_is_aligned() -> None:
    assert table(["a", "bb"], [["long", "1"]]).splitlines() == ["| a    | bb |", "|------|---:|", "| long |  1 |"]
