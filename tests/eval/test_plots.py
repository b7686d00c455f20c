"""The pictures of a report: what is drawn where, from rows with known numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from report_rows import domain_rows, made_up, three_seeds

from ttaq.cli import main
from ttaq.errors import DataError
from ttaq.eval.plot import plot
from ttaq.eval.plot_cost import plot_cost
from ttaq.eval.plot_stream import plot_stream
from ttaq.eval.report import build_report
from ttaq.eval.rows import Row

pytest.importorskip("matplotlib")
from matplotlib import image
from matplotlib.figure import Figure

METHODS = ["source", "norm", "tent"]
DRAW = [plot, plot_stream, plot_cost]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **options: object) -> None:
        save(self, *args, **options)  # type: ignore[arg-type]
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def tick_names(axis: object) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("draw", DRAW)
def test_every_method_has_marks(draw: object, tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    draw(build_report([*three_seeds(), *domain_rows("tent", 0, [50.0, 60.0, 70.0], net="W4A4")]), path)  # type: ignore[operator]
    pixels = image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 300
    for colour in ("#000000", "#0072B2"):
        wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        assert (abs(pixels - wanted).max(-1) < 0.02).sum() > 50, f"no mark in {colour}"


PICTURES: list[tuple[object, dict[str, object]]] = [
    *((draw, {}) for draw in DRAW),
    *((draw, {"setting": "gradual"}) for draw in DRAW[:2]),
    *((draw, {"setting": "ccc", "length": 36}) for draw in DRAW[:2]),
    *((draw, {"setting": "mixed", "stretches": 50}) for draw in DRAW[:2]),
]


@pytest.mark.parametrize(("draw", "stream"), PICTURES)
def test_nothing_is_cut_off_or_in_the_way(
    draw: object, stream: dict[str, object], figures: list[Figure], tmp_path: Path
) -> None:
    """Labels stay inside the picture, and those of an axis do not cover each other."""
    draw(build_report(made_up(METHODS, ["W4A4"], 1, **stream)), tmp_path / "p.png")  # type: ignore[operator, arg-type]
    (figure,) = figures
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        children = [axes, *axes.child_axes]
        axis_labels = [[*each.xaxis.get_ticklabels()] for each in children] + [[*axes.yaxis.get_ticklabels()]]
        for labels in axis_labels:
            shown = [label for label in labels if label.get_visible() and label.get_text()]
            boxes = [label.get_window_extent() for label in shown if label.get_rotation() == 0]
            assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
        box = axes.get_tightbbox()
        assert box is not None
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1


def test_errors_by_domain(figures: list[Figure], tmp_path: Path) -> None:
    plot(build_report(three_seeds()), tmp_path / "p.svg")
    (panel,) = figures[0].axes
    assert tick_names(panel.xaxis) == ["gaussian noise", "fog", "contrast", "mean"]
    source, tent = (container.lines[0] for container in panel.containers)
    assert list(source.get_ydata()) == pytest.approx([20, 30, 40, 30])
    assert list(tent.get_ydata()) == pytest.approx([18, 28, 38, 28])
    low, high = panel.containers[0].lines[2][0].get_segments()[3][:, 1]
    assert (high - low) / 2 == pytest.approx(4.302653 * 10 / 3**0.5, rel=1e-6)


def test_many_domains_are_drawn_as_the_tables_show_them(figures: list[Figure], tmp_path: Path) -> None:
    plot(build_report(made_up(["source"], ["float"], 1, setting="gradual")), tmp_path / "p.png")
    assert len(tick_names(figures[0].axes[0].xaxis)) == 16
    assert figures[0].get_figwidth() <= 18


def stream_rows() -> list[Row]:
    """Two domains of 100 images; in the first, source is wrong more often with every stretch of ten."""
    rows = domain_rows("source", 0, [45.0, 20.0], corruptions=("fog", "contrast"))
    rows[0]["trace"]["wrong"] = [*range(10)]
    rows[1]["trace"]["wrong"] = [2] * 10
    return rows


def test_error_over_the_stream(figures: list[Figure], tmp_path: Path) -> None:
    other = [{**row, "seed": 1, "stream": row["stream"].replace("seed=0", "seed=1")} for row in stream_rows()]
    other[1] = {**other[1], "trace": {"n": [10] * 10, "wrong": [4] * 10}}
    plot_stream(build_report([*stream_rows(), *other]), tmp_path / "p.png")
    (panel,) = figures[0].axes
    line = panel.lines[0]
    assert list(line.get_xdata()) == [10 * k + 5 for k in range(20)]
    assert list(line.get_ydata()) == pytest.approx([*range(0, 100, 10), *[30] * 10])
    shade, ticks = panel.collections
    edge = shade.get_paths()[0].vertices[:, 1]
    assert (edge.min(), edge.max()) == (0, 100)  # 30 ± 127 stays between 0 and 100.
    assert [segment[0, 0] for segment in ticks.get_segments()] == [100, 200]
    (top,) = panel.child_axes
    assert tick_names(top.xaxis) == ["fog", "contrast"]
    assert list(top.get_xticks()) == [50, 150]


def test_stretches_are_joined_inside_domains(figures: list[Figure], tmp_path: Path) -> None:
    """15 domains of 50 stretches are 750: five of them become one point, and none crosses the end of a domain."""
    rows = made_up(["source"], ["float"], 1, stretches=50)
    plot_stream(build_report(rows), tmp_path / "p.png")
    line = figures[0].axes[0].lines[0]
    assert len(line.get_xdata()) == 150
    wrong = np.array([row["trace"]["wrong"] for row in rows]).reshape(150, 5).sum(1)
    assert list(line.get_ydata()) == pytest.approx(list(wrong / 10))
    assert line.get_xdata()[0] == 500


def test_many_domains_are_joined_and_walks_have_no_borders(figures: list[Figure], tmp_path: Path) -> None:
    rows = made_up(["source"], ["float"], 2, setting="ccc", length=310)
    plot_stream(build_report(rows), tmp_path / "p.png")
    (panel,) = figures[0].axes
    line = panel.lines[0]
    assert len(line.get_xdata()) == 104  # 310 domains in threes
    three = [np.mean([row["error"] for row in rows if row["seed"] == seed and row["index"] < 3]) for seed in (0, 1)]
    assert line.get_ydata()[0] == pytest.approx(np.mean(three))
    assert len(panel.collections) == 1  # The shade, no ticks.


def test_seeds_of_different_lengths_share_what_both_have(figures: list[Figure], tmp_path: Path) -> None:
    shorter = [{**row, "seed": 1, "stream": row["stream"].replace("seed=0", "seed=1")} for row in stream_rows()]
    shorter[1] = {**shorter[1], "n": 45, "trace": {"n": [15, 30], "wrong": [3, 15]}}
    plot_stream(build_report([*stream_rows(), *shorter]), tmp_path / "p.png")
    line = figures[0].axes[0].lines[0]
    assert line.get_xdata()[-1] == 135
    # Images 110 to 120 of the second seed: half from a stretch with 20 %, half from one with 50 %.
    assert line.get_ydata()[11] == pytest.approx((20 + 35) / 2)


def test_cost(figures: list[Figure], tmp_path: Path) -> None:
    rows = three_seeds()
    for row in rows:
        slow = 2.0 if row["method"] == "tent" else 1.0
        row["latency_ms"] = {"p50": slow * (10.0 + row["index"] + row["seed"]), "p95": 99.0, "batches": 1}
        row["memory"] = {"peak_mb": 100.0 + row["index"] + row["seed"], "of": "test"}
    plot_cost(build_report(rows), tmp_path / "p.png")
    left, right = figures[0].axes
    points = [[float(container.lines[0].get_xdata()[0]) for container in panel.containers] for panel in (left, right)]
    assert points == [pytest.approx([12.0, 24.0]), pytest.approx([103.0, 103.0])]
    heights = [float(container.lines[0].get_ydata()[0]) for container in left.containers]
    assert heights == pytest.approx([70.0, 72.0])
    across, up = left.containers[0].lines[2]
    assert np.ptp(across.get_segments()[0][:, 0]) / 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert np.ptp(up.get_segments()[0][:, 1]) / 2 == pytest.approx(4.302653 * 10 / 3**0.5, rel=1e-6)
    assert left.get_xscale() == "linear"


def test_costs_far_apart_stand_on_a_logarithmic_axis(figures: list[Figure], tmp_path: Path) -> None:
    rows = three_seeds()
    for row in rows:
        row["latency_ms"] = {"p50": 200.0 if row["method"] == "tent" else 1.0, "p95": 99.0, "batches": 1}
    plot_cost(build_report(rows), tmp_path / "p.png")
    left, right = figures[0].axes
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert {"1", "10", "100"} <= set(tick_names(left.xaxis))


@pytest.mark.parametrize(("slow", "spread", "least"), [(1.0, 3.0, 0.0), (100.0, 0.1685, 1.08425 / 3)])
def test_wide_bars_do_not_stretch_the_axes(
    slow: float, spread: float, least: float, figures: list[Figure], tmp_path: Path
) -> None:
    """On the linear axis the interval is 2.5 ± 19.1, on the logarithmic one 1.084 ± 1.071."""
    rows = [row for seed in (0, 1) for row in domain_rows("source", seed, [90.0 * seed] * 3)]
    rows += [row for seed in (0, 1) for row in domain_rows("tent", seed, [80.0 * seed] * 3)]
    for row in rows:
        time = (1.0 + spread * row["seed"]) * (slow if row["method"] == "tent" else 1.0)
        row["latency_ms"] = {"p50": time, "p95": time, "batches": 1}
    plot_cost(build_report(rows), tmp_path / "p.png")
    left, right = figures[0].axes
    assert left.get_ylim() == right.get_ylim() == (0, 100)
    assert left.get_xlim()[0] == pytest.approx(least)


@pytest.mark.parametrize(
    ("memories", "says"),
    [
        ([(None, "none"), (None, "none")], "not measured"),
        ([(1.0, "resident set"), (2.0, "GPU allocator")], "not comparable, measured in different ways"),
    ],
)
def test_memory_that_cannot_be_drawn(
    memories: list[tuple[float | None, str]], says: str, figures: list[Figure], tmp_path: Path
) -> None:
    rows = three_seeds()
    for row in rows:
        row["memory"] = dict(zip(("peak_mb", "of"), memories[row["method"] == "tent"], strict=True))
    plot_cost(build_report(rows), tmp_path / "p.png")
    left, right = figures[0].axes
    assert len(left.containers) == 2
    assert len(right.containers) == 0
    assert says in right.texts[0].get_text()


@pytest.mark.parametrize("draw", DRAW)
def test_a_picture_that_cannot_be_written(draw: object, tmp_path: Path) -> None:
    report = build_report(three_seeds())
    for path in (tmp_path / "missing" / "plot.png", tmp_path / "plot.nonsense"):
        with pytest.raises(DataError, match="cannot write"):
            draw(report, path)  # type: ignore[operator]


def test_a_stream_that_nobody_finished_has_no_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no method has finished a stream yet"):
        plot_stream(build_report(domain_rows("source", 0, [1.0])), tmp_path / "p.png")


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_one_command_draws_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", three_seeds())
    folder, table = tmp_path / "new" / "plots", tmp_path / "t.csv"
    assert main(["report", rows, "--out", str(tmp_path / "r.md"), "--plots", str(folder), "--csv", str(table)]) == 0
    written = ["domains.png", "stream.png", "cost.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(written)
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {path}" for path in (tmp_path / "r.md", table, *(folder / name for name in written))
    ]
    assert table.read_text().count("\n") == 1 + 18


def test_flags_of_the_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nets = [row for net in ("float", "W4A4", "W8A8") for row in domain_rows("source", 0, [1.0, 2.0, 3.0], net)]
    rows = write(tmp_path / "rows.jsonl", nets)
    assert main(["report", rows, "--baseline-group", "W8A8"]) == 0
    assert "minus that of **resnet, W8A8" in capsys.readouterr().out
    for flags, says in (
        (["--baseline-group", "W2"], "no group is named 'W2', the files have: resnet, float; resnet, W4A4"),
        (["--plots", rows], "--plots: cannot use the folder"),
        (["--csv", str(tmp_path / "absent" / "t.csv")], "--csv: the folder"),
    ):
        assert main(["report", rows, *flags]) == 1
        said = capsys.readouterr()
        assert says in said.err
        assert said.out == ""  # Nothing was done before.
