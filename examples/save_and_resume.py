"""Save a quantized model and a running adapter; continue elsewhere with the same outputs, bit for bit."""

import tempfile
from pathlib import Path

import torch

from ttaq.io import load_model, load_state, save_model, save_state
from ttaq.models import build as build_model
from ttaq.ptq import quantize
from ttaq.tta import build


def main() -> None:
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    kwargs = {"num_classes": 10, "width": 8}
    model = quantize(build_model("cifar_resnet8", **kwargs).eval(), torch.rand(32, 3, 32, 32), "W4A4")

    # The header of the file says how to build the model: loading needs nothing but the path.
    save_model(folder / "model.safetensors", model, architecture="cifar_resnet8", kwargs=kwargs, method="rtn")
    stream = torch.rand(6, 16, 3, 32, 32)
    adapter = build("tent", model, lr=1e-2)
    for batch in stream[:3]:
        adapter(batch)

    # Weights that adapt, optimizer and counters; the rest is in the model file. The write is all or nothing.
    save_state(folder / "adapter.safetensors", adapter.state_dict())
    expected = [adapter(batch) for batch in stream[3:]]

    # Later, or on another machine.
    again = build("tent", load_model(folder / "model.safetensors").model, lr=1e-2)
    again.load_state_dict(load_state(folder / "adapter.safetensors"))
    resumed = [again(batch) for batch in stream[3:]]
    print("same outputs after resuming:", all(map(torch.equal, expected, resumed)))
    print("counters:", again.counters)

    # Back to the model as it was quantized.
    again.reset()
    print("reset equals a new adapter:", torch.equal(again(stream[0]), build("tent", model, lr=1e-2)(stream[0])))


if __name__ == "__main__":
    main()
