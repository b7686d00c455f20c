"""Error and calibration error against hand-worked numbers."""

import math

import pytest
import torch

from ttaq.errors import InputError
from ttaq.eval.metrics import Scores, error_percent, expected_calibration_error


def test_error_of_one_wrong_in_four() -> None:
    assert error_percent(torch.tensor([True, True, False, True])) == 25.0


def test_ece_by_hand() -> None:
    # Bin (0.6, 0.667]: confidences 0.62, 0.66, one right, |0.5 - 0.64| 2/4.
    # Bin (0.933, 1]: confidences 0.95, 1.0, both right, |1 - 0.975| 2/4.
    confidence = torch.tensor([0.62, 0.66, 0.95, 1.0])
    correct = torch.tensor([True, False, True, True])
    assert expected_calibration_error(confidence, correct) == pytest.approx(100 * (0.5 * 0.14 + 0.5 * 0.025), abs=1e-5)


def test_ece_bins_are_open_below_and_closed_above() -> None:
    # With 2 bins, 0.5 belongs to the lower one and 0 too, so 0.5 and 0.0 share a bin and their gaps cancel.
    confidence, correct = torch.tensor([0.5, 0.0]), torch.tensor([False, False])
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(25.0)
    apart = torch.tensor([0.5, 0.5001]), torch.tensor([True, False])
    assert expected_calibration_error(*apart, bins=2) == pytest.approx(50.0, abs=0.01)


def test_a_calibrated_model_has_ece_zero_and_an_overconfident_one_its_gap() -> None:
    correct = torch.arange(100) < 80
    assert expected_calibration_error(torch.full((100,), 0.8), correct) == pytest.approx(0.0, abs=1e-5)
    assert expected_calibration_error(torch.full((100,), 0.99), correct) == pytest.approx(19.0, abs=1e-4)


def test_scores_do_not_depend_on_the_batches() -> None:
    logits = torch.randn(37, 10, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(37) % 10
    one, many = Scores(), Scores()
    one.add(logits, labels)
    for part, wanted in zip(logits.split(8), labels.split(8), strict=True):
        many.add(part, wanted)
    assert (one.error(), one.ece(), one.count) == (many.error(), many.ece(), 37)
    assert one.error() == pytest.approx(100 * (logits.argmax(1) != labels).float().mean().item())


def test_logits_that_are_not_finite_are_wrong_and_certain() -> None:
    scores = Scores()
    scores.add(torch.tensor([[math.nan, 0.0], [0.0, math.inf], [0.0, 9.0]]), torch.tensor([0, 1, 1]))
    assert scores.nonfinite == 2
    assert scores.error() == pytest.approx(200 / 3)
    assert scores.ece() == pytest.approx(200 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: error_percent(torch.empty(0, dtype=torch.bool)), "0 predictions"),
        (lambda: expected_calibration_error(torch.ones(3), torch.ones(2, dtype=torch.bool)), r"\(3,\)"),
        (lambda: Scores().add(torch.ones(3, 2), torch.ones(2, dtype=torch.long)), r"\[B, C\] and \[B\]"),
        (lambda: Scores().error(), "0 predictions"),
    ],
)
def test_unusable_scores(call: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        call()  # type: ignore[operator]


def test_class_error_counts_each_class_that_occurred_once() -> None:
    logits = torch.eye(4)[[0, 0, 0, 0, 0, 1]]
    scores = Scores()
    scores.add(logits, torch.tensor([0, 0, 0, 0, 2, 1]))
    assert scores.error() == pytest.approx(100 / 6)
    assert scores.class_error() == pytest.approx(100 / 3)  # Classes 0, 1 and 2 with 0, 0 and 100 %.


def test_parts_and_trace() -> None:
    scores = Scores()
    for start in range(0, 12, 2):
        labels = torch.tensor([start % 3, 1])
        scores.add(torch.eye(3)[[1, 1]], labels, torch.tensor([0, 7]))
    assert scores.parts() == {0: {"n": 6, "error": 100.0 * 4 / 6}, 7: {"n": 6, "error": 0.0}}
    assert scores.trace(6) == {"n": [2] * 6, "wrong": [1, 1, 0, 1, 1, 0]}
    assert scores.trace(4) == {"n": [4, 4, 4], "wrong": [2, 1, 1]}
    assert scores.trace(1) == {"n": [12], "wrong": [4]}
