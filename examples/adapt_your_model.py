"""Quantize a network of your own and adapt it while it reads from a loader of your own."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ttaq.data import load_digits, to_float
from ttaq.data.corruptions import corrupt
from ttaq.ptq import quantize
from ttaq.tta import build


def train_your_model(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Stands for whatever gave you a trained network with batch norm."""
    model = nn.Sequential(
        *(nn.AvgPool2d(2), nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(4):
        for x, y in DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    train, test = load_digits()
    model = train_your_model(to_float(train.images), train.labels)

    # Post-training quantization needs some unlabelled images; 4 bits here, 8 in the first and the last layer.
    quantized = quantize(model, to_float(train.images[:256]), "W4A4")
    print(quantized.report)

    foggy = corrupt(to_float(test.images), "fog", 5, torch.Generator().manual_seed(0))
    for name, options in (("source", {}), ("norm", {}), ("tent", {"lr": 1e-3})):
        adapter = build(name, quantized, **options)
        wrong = 0
        for x, y in DataLoader(TensorDataset(foggy, test.labels), batch_size=50):
            wrong += int((adapter(x).argmax(1) != y).sum())
        print(f"{name:6} {100 * wrong / len(foggy):5.1f} % errors in fog, {adapter.counters['updates']} updates")


if __name__ == "__main__":
    main()
