"""How many instructions a kernel that streams may execute for each byte that it moves, and which do not keep to it yet.

An H200 executes 31 instructions in the time in which it moves 4 bytes: 132 multiprocessors x 128 lanes x 1.98 GHz at
4.3 TB/s. Counted are the instructions in the SASS for sm_90, slow paths of divisions included, over all threads. What
is above the budget computes for longer than its bytes take: the limits here are what was compiled, rounded up, so that
they can only be lowered.
"""

BUDGET = 31 / 4

# Reductions run as many tiles after each other as their tensor has, one for the small tensors here. Losses and perturb
# are bound by their launch, products by the tensor cores.
_STREAMING = (
    "batch_norm",
    "fake_quantize",
    "gather_mix",
    "group_affine",
    "layer_norm",
    "norm_act_quant",
    "reconstruction",
    "soft_round",
)
_REDUCING = {"_partial_kernel", "_merge_kernel", "sums_kernel", "statistics_kernel", "_penalty_kernel", "_step_kernel"}

# Start of the launch's name, kernel -> instructions per byte. Layer norm takes the quotients and the root of a row in
# each of its threads; the others take exponentials and logarithms, or a scale for each element. See docs/kernels.md.
_ABOVE = {
    ("fake_quantize-forward-col", "_forward_kernel"): 9.0,
    ("fake_quantize-lsq-col", "_backward_kernel"): 8.5,
    ("layer_norm-384", "_forward_kernel"): 9.5,
    ("layer_norm-768-bfloat16", "_forward_kernel"): 12.5,
    ("reconstruction-bfloat16-p_2.4", "_kernel"): 12.0,
    ("soft_round-soft", "_forward_kernel"): 9.0,
    ("soft_round-penalty_backward", "_penalty_backward_kernel"): 10.0,
}


SMALLEST = 1 << 15  # elements: less does not fill the tiles


def streams(launch: str, kernel: str) -> bool:
    return launch.startswith(_STREAMING) and kernel not in _REDUCING


def budget(launch: str, kernel: str) -> float:
    above = [limit for (start, name), limit in _ABOVE.items() if launch.startswith(start) and name == kernel]
    return max([BUDGET, *above])
