"""How many instructions a kernel that streams may execute for each byte that it moves.

An H200 executes 31 instructions in the time in which it moves 4 bytes: 132 multiprocessors x 128 lanes x 1.98 GHz at
4.3 TB/s. Counted are the instructions in the SASS for sm_90, slow paths of divisions included, over all threads. What
is above the budget computes for longer than its bytes take.
"""

BUDGET = 31 / 4

# Reductions run as many tiles after each other as their tensor has: their loop is what counts, on a full tile. Small
# tensors give them one tile and no loop. A step on soft-rounded weights holds the code for every weight, of which a
# program runs one. Losses and perturb are bound by their launch, products by the tensor cores.
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
_REDUCING = {"_partial_kernel", "_merge_kernel", "sums_kernel", "statistics_kernel", "_step_kernel"}

SMALLEST = 1 << 15  # elements: less does not fill the tiles


def streams(launch: str, kernel: str) -> bool:
    return launch.startswith(_STREAMING) and kernel not in _REDUCING
