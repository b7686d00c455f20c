"""Student's t against tables and SciPy."""

import math

import pytest

from ttaq.errors import InputError
from ttaq.eval.student_t import t_cdf, t_interval, t_quantile

# Two-sided 95 %: every printed table has these.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize("dof", TABLE)
def test_quantile_against_the_printed_table(dof: int) -> None:
    assert t_quantile(0.975, dof) == pytest.approx(TABLE[dof], abs=5e-4)


def test_closed_forms() -> None:
    # One degree of freedom is the Cauchy distribution; two have t = a sqrt(2 / (1 - a^2)) with a = 2 p - 1.
    assert t_quantile(0.9, 1) == pytest.approx(math.tan(0.4 * math.pi), rel=1e-12)
    assert t_quantile(0.9, 2) == pytest.approx(0.8 * math.sqrt(2 / (1 - 0.64)), rel=1e-12)


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 7, 12, 101])
@pytest.mark.parametrize("probability", [0.001, 0.3, 0.5, 0.8, 0.9999])
def test_against_scipy(dof: int, probability: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.t.ppf(probability, dof)
    assert t_quantile(probability, dof) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert t_cdf(expected, dof) == pytest.approx(probability, abs=1e-12)


def test_interval_by_hand() -> None:
    # 1, 2, 6: mean 3, s = sqrt(7), half width 4.3027 sqrt(7) / sqrt(3).
    interval = t_interval([1.0, 2.0, 6.0])
    assert (interval.mean, interval.n) == (3.0, 3)
    assert interval.half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert interval.text() == "3.00 ± 6.57"
    assert interval.text(signed=True) == "+3.00 ± 6.57"


def test_one_value_has_no_interval() -> None:
    assert t_interval([5.0]).half is None
    assert t_interval([5.0]).text() == "5.00"


@pytest.mark.parametrize("call", [lambda: t_interval([]), lambda: t_quantile(1.0, 3), lambda: t_cdf(0.0, 0)])
def test_impossible_questions(call: object) -> None:
    with pytest.raises(InputError):
        call()  # type: ignore[operator]
