"""What goes through the activation quantizers of a model: samples to fit their grids to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn import QuantizedModel, Quantizer, activation_quantizers

__all__ = ["Progress", "observe"]

Progress = Callable[[int, int, str], None]  # (steps done, steps in total, what)
_IMAGES = 256
_SAMPLES = 65_534  # values kept of a tensor, beside its smallest and its largest


class _Samples:
    """A random share of the values of one tensor, batch by batch, and the ends of its range.

    Room for them is made before the first batch: a little memory that is kept between tensors that come and go would
    split what they leave behind, and each batch would take new memory.
    """

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator = generator
        self.wanted = 0  # of the next batch
        self.kept = torch.empty(_SAMPLES, device=device)
        self.ends = torch.tensor([torch.inf, -torch.inf], device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        values = x.detach().flatten().float()
        least, most = values.aminmax()
        torch.minimum(self.ends[0], least, out=self.ends[0])
        torch.maximum(self.ends[1], most, out=self.ends[1])
        if values.numel() > self.wanted:
            # Drawn, not strided: a stride may fall into step with the rows of an image.
            chosen = torch.randint(values.numel(), (self.wanted,), generator=self.generator)
            values = values[chosen.to(values.device)]
        self.kept[self.count : self.count + len(values)] = values
        self.count += len(values)

    def values(self) -> Tensor:
        return torch.cat([self.kept[: self.count], self.ends])


def observe(
    model: QuantizedModel,
    images: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """Run 256 of the `images` [N, C, H, W], drawn by `seed`, through a model in eval mode, and return up to 65,536 of
    the values that each activation quantizer reads, by its name; the smallest and the largest value are among them.

    The images are moved to the device and type of the model. progress: called after each batch. Raises `InputError` if
    the model fails on the images or makes NaN or Inf of them.
    """
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(len(images), generator=generator)[:_IMAGES].to(images.device)]
    own = next(tensor for tensor in model.parameters() if tensor.is_floating_point())
    quantizers = activation_quantizers(model)
    samples = {name: _Samples(generator, own.device) for name in quantizers}
    with torch.no_grad(), _listening(quantizers, samples):
        for batch in torch.split(images, batch_size):
            for sample in samples.values():
                sample.wanted = _SAMPLES * len(batch) // len(images)
            try:
                model(batch.to(own.device, own.dtype))
            except (RuntimeError, ValueError, IndexError) as error:
                raise InputError(
                    f"quantize: the model fails on calibration images of shape {tuple(batch.shape)}: "
                    f"{' '.join(str(error).split())[:300]}"
                ) from error
            if progress is not None:
                progress("observing activations")
    found = {name: sample.values() for name, sample in samples.items()}
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise InputError(
                f"quantize: the values at {name} have NaN or Inf on the calibration images, expected finite ones; "
                f"check the weights and the norm statistics before it"
            )
    return found


@contextmanager
def _listening(quantizers: dict[str, Quantizer], samples: dict[str, _Samples]) -> Iterator[None]:
    def listen(sample: _Samples) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: sample.add(args[0])  # noqa: ARG005

    handles = [module.register_forward_pre_hook(listen(samples[name])) for name, module in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
