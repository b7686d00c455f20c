"""What a benchmark is: an op, the shapes it is timed at, baselines in plain torch, and the bytes it must move."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IMPLEMENTATIONS", "SUITES", "Case", "Op", "Problem", "floor_us", "problem"]

IMPLEMENTATIONS = ("ttaq", "eager", "compile", "torch", "public")
SUITES = (
    "tiny",
    "cpu",
    "cuda",
)  # seconds of smoke test; CIFAR networks on a laptop; the networks of the papers on a GPU

# Bytes per second: H200 and H100 (SXM) from the specification, the others as a copy reaches (gau-nernst/gn-kernels).
_BANDWIDTH = {"H200": 4.3e12, "H100 80GB HBM3": 3.35e12, "B200": 5.98e12, "A100": 1.7e12}


@dataclass(frozen=True)
class Case:
    """One tensor of one network. `step` is forward and backward, otherwise only the forward runs, without gradients."""

    op: str
    model: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    variant: str = ""
    step: bool = False

    @property
    def key(self) -> dict[str, object]:
        """What a result row says about the case; two cases never agree in all of it."""
        return {
            "op": self.op,
            "variant": self.variant,
            "direction": "step" if self.step else "forward",
            "model": self.model,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
        }

    def tensor(self, draw: torch.Generator) -> Tensor:
        """Random data of this shape, type and layout: zeros would run faster than what users have."""
        x = torch.randn(self.shape, generator=draw, device=draw.device).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else x


@dataclass(frozen=True)
class Op:
    """A public function of `ttaq_kernels` and everything needed to time it.

    inputs: tensors of a case; the floating ones that require a gradient get one in a step.
    ours: the op. composition: the same in plain torch ops, in the type of its first argument; what torch.compile gets.
    single: the op that torch itself has for this, where there is one. public: the best kernel of another package, which
        it imports when it is called; where the package is missing, its row says so.
    bytes_moved: what a step or a forward must read and write at least.
    tolerances: (relative, absolute) of the result and of each gradient, against the composition in `check_dtype`.
    """

    name: str
    cases: Callable[[str], list[Case]]
    inputs: Callable[[Case, torch.Generator], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    composition: Callable[..., Tensor]
    bytes_moved: Callable[[Case], int]
    tolerances: Callable[[Case], list[tuple[float, float]]]
    check_dtype: torch.dtype = torch.float64
    single: Callable[..., Tensor] | None = None
    single_fits: Callable[[Case], bool] = lambda _: True
    public: Callable[..., Tensor] | None = None

    def implementations(self, case: Case) -> tuple[str, ...]:
        """The names of what can be timed for a case."""
        missing = {"public"} if self.public is None else set()
        missing |= set() if self.single is not None and self.single_fits(case) else {"torch"}
        return tuple(name for name in IMPLEMENTATIONS if name not in missing)


def _runner(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor, step: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that can be timed: the result, and in a step the gradients of the inputs that require them."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*inputs),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        result = function(*inputs)
        return (result.detach(), *torch.autograd.grad(result, wanted, grad))

    return forward_and_backward if step else forward


@dataclass(frozen=True)
class Problem:
    """A case on a device: inputs and the gradient of the result. A timed call walks over all copies of them."""

    op: Op
    case: Case
    copies: list[tuple[tuple[Tensor, ...], Tensor]]

    def implementation(self, name: str) -> Callable[..., Tensor]:
        """What to time under one of the names that the op has for this case."""
        if name == "compile":
            # What earlier cases compiled would count against the limit of recompilations.
            torch.compiler.reset()
            return torch.compile(self.op.composition, dynamic=False)
        if name == "torch" and self.op.single is not None:
            return self.op.single
        if name == "public" and self.op.public is not None:
            return self.op.public
        return self.op.ours if name == "ttaq" else self.op.composition

    def call(self, name: str) -> tuple[Tensor, ...]:
        """The result, in a step with the gradients, for the first copy of the inputs."""
        return _runner(self.implementation(name), *self.copies[0], self.case.step)()

    def timed(self, name: str) -> Callable[[], None]:
        function = self.implementation(name)
        calls = [_runner(function, *copy, self.case.step) for copy in self.copies]

        def run() -> None:
            for call in calls:
                call()

        return run

    def check(self) -> tuple[bool, float, bool]:
        """Whether the op is right, its largest error, and whether it is exact."""
        inputs, grad = self.copies[0]
        ours = _runner(self.op.ours, inputs, grad, self.case.step)()
        wide = tuple(
            t.detach().to(self.op.check_dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for t in inputs
        )
        expected = _runner(self.op.composition, wide, grad.to(self.op.check_dtype), self.case.step)()
        right, exact = True, True
        for got, want, (rtol, atol) in zip(ours, expected, self.op.tolerances(self.case), strict=False):
            error = (got.to(want.dtype) - want).abs()
            right &= bool((error <= atol + rtol * want.abs()).all())
            exact &= torch.equal(got, want.to(got.dtype))
        first = (ours[0].to(expected[0].dtype) - expected[0]).abs()
        return right, first.max().item() if first.numel() else 0.0, exact


def problem(op: Op, case: Case, device: torch.device, seed: int) -> Problem:
    """On a GPU the inputs are repeated, up to 64 times, until they no longer fit into its last cache."""
    draw = torch.Generator(device).manual_seed(seed)
    copies = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = max(1, math.ceil(2 * cache / (math.prod(case.shape) * case.dtype.itemsize)))
    made = []
    for _ in range(min(copies, 64)):
        inputs = op.inputs(case, draw)
        with torch.no_grad():
            grad = torch.empty_like(op.ours(*inputs))
            # Codes have no gradient.
            made.append((inputs, grad.normal_(generator=draw) if grad.is_floating_point() else grad))
    return Problem(op, case, made)


def floor_us(bytes_moved: int, device_name: str) -> float | None:
    """The time that moving the bytes takes at least; None for a device whose bandwidth is not in the table."""
    for name, bandwidth in _BANDWIDTH.items():
        if name in device_name:
            return bytes_moved / bandwidth * 1e6
    return None
