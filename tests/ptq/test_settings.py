"""The numbers of the methods, and the schedule of the penalty."""

from __future__ import annotations

import pytest

from ttaq.ptq import METHODS, Reconstruction, settings_of


def test_the_exponent_falls_from_20_to_2_behind_the_warm_up() -> None:
    settings = Reconstruction(iterations=1000)
    assert settings.exponent(0) is settings.exponent(199) is None
    assert settings.exponent(200) == pytest.approx(20)
    assert settings.exponent(600) == pytest.approx(11)
    assert settings.exponent(1000) == pytest.approx(2)


def test_without_a_warm_up_it_starts_at_once() -> None:
    assert Reconstruction(iterations=10, warm_up=0.0).exponent(0) == 20


def test_the_methods_are_those_of_their_papers() -> None:
    adaround, brecq, qdrop, pdquant, ttaq = (METHODS[n] for n in ("adaround", "brecq", "qdrop", "pdquant", "ttaq"))
    assert (adaround.single_layers, adaround.keep_quantized, adaround.scale_lr) == (True, 1.0, 0.0)
    assert (brecq.single_layers, brecq.keep_quantized) == (False, 1.0)
    assert (qdrop.iterations, qdrop.keep_quantized, qdrop.weight_lr, qdrop.scale_lr) == (20_000, 0.5, 1e-3, 4e-5)
    assert (pdquant.prediction, pdquant.temperature, pdquant.weight_lr) == (10.0, 4.0, 3e-3)
    assert (ttaq.norm_statistics, ttaq.keep_quantized, ttaq.distillation) == ("batch", 1.0, 4000)


def test_presets_lie_between_the_method_and_what_the_caller_sets() -> None:
    assert settings_of("qdrop", "fast").iterations == 400
    assert settings_of("qdrop", "fast", {"iterations": 7}).iterations == 7
    assert settings_of("qdrop", "fast").keep_quantized == 0.5
    assert (settings_of("ttaq", "fast").distillation, settings_of("qdrop", "fast").distillation) == (400, 0)
    assert settings_of("adaround", "fast").scale_lr == 0, "what a method leaves alone, a preset does not train"
    assert settings_of("rtn", "fast") is None


def test_what_differs_from_the_defaults() -> None:
    assert Reconstruction().changed() == {}
    assert Reconstruction(units=("a", "b"), iterations=5).changed() == {"units": ["a", "b"], "iterations": 5}
    assert Reconstruction().but(units=["a"]).units == ("a",)
