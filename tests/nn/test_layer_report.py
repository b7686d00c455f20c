"""The report names every layer, also those that conversion does not cover."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttaq.nn import LayerReport, Report, convert


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.instance = nn.InstanceNorm2d(8)
        self.bn = nn.BatchNorm2d(8)
        self.row = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.flat = nn.BatchNorm1d(8)
        self.kernel = nn.Parameter(torch.ones(8, 8, 1, 1))
        self.volume = nn.BatchNorm3d(8)
        self.old = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.instance(self.up(self.group(self.stem(x))))).relu()
        x = self.volume(torch.conv2d(x, self.kernel)[..., None]).flatten(2)
        x = self.row(x).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        return self.fc(self.flat(x.mean(1)))


def test_every_layer_is_named() -> None:
    report = convert(Zoo().eval(), "W4A4").report
    covered = "type is not covered"
    expected = {
        "stem": ("QuantConv2d", 8, None, "first"),
        "group": ("GroupNorm", None, None, covered),
        "up": ("ConvTranspose2d", None, None, covered),
        "instance": ("InstanceNorm2d", None, None, covered),
        "bn": ("AdaptiveBatchNorm2d", None, None, "adaptive"),
        "conv2d": ("conv2d", None, None, "a call, not a layer"),
        "volume": ("BatchNorm3d", None, None, covered),
        "row": ("Conv1d", None, None, covered),
        "attention": ("MultiheadAttention", None, None, covered),
        "flat": ("BatchNorm1d", None, None, covered),
        "fc": ("QuantLinear", 8, 8, "last"),
        "old.0": ("Linear", None, None, "forward does not use it"),
        "old.1": ("Linear", None, None, "forward does not use it"),
    }
    got = {r.name: (r.type, r.weight_bits, r.activation_bits, r.note.removeprefix("stays float: ")) for r in report}
    assert list(got.items()) == list(expected.items())


def test_the_report_prints_as_a_table() -> None:
    report = Report([LayerReport("conv", "QuantConv2d", 8, None, "first"), LayerReport("fc.long", "Linear", None, 4)])
    assert str(report).split("\n") == [
        "layer    type         weight  input  note",
        "conv     QuantConv2d  8 bit   float  first",
        "fc.long  Linear       float   4 bit",
    ]
