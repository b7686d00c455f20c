"""Seeded perturbation of many small parameters, out of place: base + c z(seed), where z is never stored.

The elements of all parameters are numbered one after the other, each tensor in its logical order. Element e draws the
four words w0, ..., w3 (32 bits each) of Philox4x32-10 with the seed as its key and the counter (e, 0, 0, 0):

    signs        z = 1 - 2 s,                                          s = bit 31 of w0: +1 and -1, mean 0, variance 1
    half_to_one  z = (1 - 2 s) (1/2 + m / 2^24),                       m = the low 23 bits of w0: 1/2 <= |z| < 1
    normal       z = (b - 2040) f,  f = fp32(1 / sqrt(87380)),         b = the sum of the 16 bytes of w0, ..., w3

The last has mean 0, variance 1, kurtosis 3 - 0.075 and |z| <= 6.91: a normal distribution in integer arithmetic, with
one fp32 product at the end. No draw has a transcendental function, so that every machine finds the same z, and z is
found again from its seed whenever it is needed.

One launch reads 4 bytes per element and writes 4 for each seed. Called by the forward-only methods of `ttaq.tta`: to
perturb, and with the same seed and another c for the step along z, or along 1 / z (`inverse`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import ceil_div, launch, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import perturb as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["perturb"]

_WHO = "perturb"
_BLOCK = 512  # elements of one program: norm parameters are short
_TENSORS = 64  # of one launch; their pointers are arguments of the kernel
_NORMAL_STEP = tl.constexpr(reference.NORMAL_STEP)


@triton.jit
def _byte_pairs(word):
    """The sums of bytes 0 and 1, and of 2 and 3: two numbers in the halves of a word."""
    return (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)


@triton.jit
def _draw(seed, element, DISTRIBUTION: tl.constexpr):
    """z of the elements, fp32"""
    w0, w1, w2, w3 = tl.randint4x(seed, element)
    sign = 1.0 - 2.0 * (w0 >> 31).to(tl.float32)
    if DISTRIBUTION == "signs":
        z = sign
    elif DISTRIBUTION == "half_to_one":
        z = sign * (0.5 + (w0 & 0x7FFFFF).to(tl.float32) * (1.0 / 16777216.0))
    else:
        pairs = _byte_pairs(w0) + _byte_pairs(w1) + _byte_pairs(w2) + _byte_pairs(w3)
        total = ((pairs & 0xFFFF) + (pairs >> 16)).to(tl.int32)
        z = (total - 2040).to(tl.float32) * _NORMAL_STEP
    return z


@triton.jit
def _perturb_kernel(
    out_ptr,
    bases,
    c_ptr,
    seeds_ptr,
    first,
    elements,
    c_stride,
    seed_stride,
    SIZES: tl.constexpr,
    STARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[group, start + i] = base[i] + c z, or + c / z; base i has SIZES[i] elements and starts at block BLOCKS[i]"""
    total: tl.constexpr = BLOCKS[len(SIZES)]
    group = tl.program_id(0) // total
    block = tl.program_id(0) % total
    base_ptr = bases[0]
    size = tl.full((), SIZES[0], tl.int64)
    start = tl.full((), 0, tl.int64)
    before = tl.full((), 0, tl.int32)
    for i in tl.static_range(1, len(SIZES)):
        reached = block >= BLOCKS[i]
        base_ptr = tl.where(reached, bases[i], base_ptr)
        size = tl.where(reached, SIZES[i], size)
        start = tl.where(reached, STARTS[i], start)
        before = tl.where(reached, BLOCKS[i], before)
    offs = (block - before).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    element = first + start + offs
    seed = tl.load(seeds_ptr + group * seed_stride)
    c = tl.load(c_ptr + group * c_stride)
    z = _draw(seed, element, DISTRIBUTION)
    step = tl.div_rn(c, z) if INVERSE else c * z
    base = tl.load(base_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + group.to(tl.int64) * elements + element, base + step, mask=mask)


def _launch_perturb(
    bases: Sequence[Tensor],
    c: Tensor,
    seeds: Tensor,
    distribution: str,
    inverse: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    elements = sum(base.numel() for base in bases)
    out = bases[0].new_empty(seeds.numel(), elements, dtype=out_dtype)
    c_stride = c.stride(0) if c.numel() > 1 else 0
    seed_stride = seeds.stride(0) if seeds.numel() > 1 else 0
    first = 0
    for run in range(0, len(bases), _TENSORS):
        tensors = tuple(base.contiguous() for base in bases[run : run + _TENSORS] if base.numel())
        sizes = tuple(tensor.numel() for tensor in tensors)
        starts, blocks = [0], [0]
        for size in sizes:
            starts.append(starts[-1] + size)
            blocks.append(blocks[-1] + ceil_div(size, _BLOCK))
        tables = {"SIZES": sizes, "STARTS": tuple(starts), "BLOCKS": tuple(blocks)}
        arguments = (out, tensors, c, seeds, first, elements, c_stride, seed_stride)
        options = {"DISTRIBUTION": distribution, "INVERSE": inverse, "BLOCK": _BLOCK}
        launch(_WHO, _perturb_kernel, blocks[-1] * seeds.numel(), *arguments, **tables, **options, num_warps=4)
        first += starts[-1]
    return out


_perturb = register_op(
    "perturb(Tensor[] bases, Tensor c, Tensor seeds, str distribution, bool inverse) -> Tensor",
    cpu=reference.perturb,
    cuda=_launch_perturb,
    fake=lambda bases, _c, seeds, *_: bases[0].new_empty(seeds.numel(), sum(base.numel() for base in bases)),
)


def perturb(
    bases: list[Tensor] | tuple[Tensor, ...],
    c: Tensor,
    seeds: Tensor,
    distribution: str = "half_to_one",
    inverse: bool = False,
) -> list[Tensor]:
    """Every parameter plus c times random numbers that its seed determines; the parameters stay as they are.

        out = base + c z(seed), or base + c / z(seed) with `inverse`

    Args:
        bases: at least one tensor, all float32, bfloat16 or float16 of one type and on one device, any shapes.
        c: float32, shape (), (1,) or (K,): one for all groups, or one for each, such as c and -c of an antithetic pair.
        seeds: int64, shape () for one perturbation or (K,) for K groups; equal seeds draw equal numbers.
        distribution: of z, each of mean 0: "signs" (+1 or -1), "half_to_one" (a sign times U[1/2, 1), so that 1 / z is
            bounded) or "normal" (variance 1, to all purposes normal). An element's z depends on its seed, on the number
            of elements before it in `bases` and on nothing else; the module says which bits make it.
        inverse: divide by z, as the estimate of SPSA does; not for "normal", which may draw 0.

    Returns:
        A list like `bases`: tensors of their type and shape, with a first dimension K if `seeds` has one. They are
        views of one tensor [K, P] (P elements in `bases` together), in the order of `bases`.

    Gradients: none.

    Exactness: the product (or quotient) and the sum are float32, then rounded once; the same bits on every machine.

    Raises:
        KernelError: no tensors, or a type, shape, device or distribution that does not fit.

    Source: simultaneous perturbation (SPSA, Spall 1992); "half_to_one" and `inverse` are those of ZOA (arXiv
    2508.02180), "normal" that of FOZO (arXiv 2603.04733).
    """
    if not isinstance(bases, list | tuple) or not bases:
        got = "empty" if isinstance(bases, list | tuple) else f"a {type(bases).__name__}"
        raise KernelError(f"{_WHO}: bases is {got}, expected a list of at least one tensor")
    for i, base in enumerate(bases):
        _check.check_input(_WHO, f"bases[{i}]", base)
        if base.dtype != bases[0].dtype or base.device != bases[0].device:
            got, expected = (f"{tensor.dtype} on {tensor.device}" for tensor in (base, bases[0]))
            raise KernelError(f"{_WHO}: bases[{i}] is {got}, expected {expected} like bases[0]")
    _check.check_input(_WHO, "seeds", seeds, (torch.int64,))
    if seeds.ndim > 1 or seeds.numel() == 0:
        raise KernelError(f"{_WHO}: seeds has shape {tuple(seeds.shape)}, expected () or (K,) with K >= 1 groups")
    groups = seeds.numel()
    shapes = [(), (1,), (groups,)] if groups > 1 else [(), (1,)]
    _check.check_input(_WHO, "c", c, (torch.float32,))
    if tuple(c.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise KernelError(f"{_WHO}: c has shape {tuple(c.shape)}, expected {expected} for {groups} seeds")
    for name, tensor in (("c", c), ("seeds", seeds)):
        if tensor.device != bases[0].device:
            raise KernelError(
                f"{_WHO}: {name} is on {tensor.device}, expected {bases[0].device} like the bases; "
                f"move it with {name}.to(...)"
            )
    if distribution not in reference.DISTRIBUTIONS:
        raise KernelError(
            f"{_WHO}: distribution is {distribution!r}, expected one of {', '.join(reference.DISTRIBUTIONS)}"
        )
    if inverse and distribution == "normal":
        raise KernelError(f"{_WHO}: inverse is True, expected False for 'normal', which may draw 0; take another one")
    flat = _perturb([base.detach() for base in bases], c.detach(), seeds, distribution, inverse)
    shape = (groups,) if seeds.ndim else ()
    parts = flat.split([math.prod(base.shape) for base in bases], 1)
    return [part.reshape(*shape, *base.shape) for part, base in zip(parts, bases, strict=True)]
