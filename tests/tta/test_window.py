"""Single images through a window."""

import pytest
import torch
from torch import nn

from ttaq.errors import CheckpointError, InputError
from ttaq.io import load_state, save_state
from ttaq.models import build as build_model
from ttaq.tta import SlidingWindow, Tent, build


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("cifar_resnet8", width=4).eval()


IMAGES = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def answers(window: SlidingWindow, images: torch.Tensor) -> list[torch.Tensor]:
    return [window(image[None]) for image in images]


def test_learns_from_every_image_once_and_predicts_in_between() -> None:
    window = SlidingWindow(build("tent", small_model(), lr=0.1), 4)
    got = answers(window, IMAGES)
    assert window.counters["images"] == 11
    assert (window.counters["updates"], window.counters["samples"]) == (2, 8)
    expected, twin = [], Tent(small_model(), lr=0.1)
    for last in range(11):
        seen = IMAGES[max(0, last - 3) : last + 1]
        expected.append((twin(seen) if last % 4 == 3 else twin.predict(seen))[-1:])
    assert all(map(torch.equal, got, expected))


def test_reset_and_resume(tmp_path: object) -> None:
    window = SlidingWindow(build("tent", small_model(), lr=0.1), 4)
    answers(window, IMAGES[:6])
    save_state(f"{tmp_path}/state.safetensors", window.state_dict())
    expected = answers(window, IMAGES[6:])
    again = SlidingWindow(build("tent", small_model(), lr=0.1), 4)
    again.load_state_dict(load_state(f"{tmp_path}/state.safetensors"))
    assert all(map(torch.equal, answers(again, IMAGES[6:]), expected))
    again.reset()
    fresh = SlidingWindow(build("tent", small_model(), lr=0.1), 4)
    assert all(map(torch.equal, answers(again, IMAGES), answers(fresh, IMAGES)))


def test_what_it_refuses() -> None:
    adapter = build("norm", small_model())
    for length in (1, 0, 2.0):
        with pytest.raises(InputError, match="expected an integer of at least 2"):
            SlidingWindow(adapter, length)  # type: ignore[arg-type]
    window = SlidingWindow(adapter, 3)
    for bad, says in (
        (IMAGES[:2], r"shape \(2, 3, 32, 32\), expected one image"),
        (IMAGES[0], "one image"),
        (1, "int"),
    ):
        with pytest.raises(InputError, match=says):
            window(bad)  # type: ignore[arg-type]
    window(IMAGES[:1])
    with pytest.raises(InputError, match="reset the window"):
        window(torch.rand(1, 3, 16, 16))
    with pytest.raises(InputError, match="NaN"):
        window(torch.full((1, 3, 32, 32), torch.nan))
    assert window.counters["images"] == 1
    with pytest.raises(CheckpointError, match="that of a window of 3 images, expected 2"):
        SlidingWindow(adapter, 2).load_state_dict(window.state_dict())
