"""How far a kernel may be from its reference, in one place. What is not listed is equal bit for bit.

A sum is compared relative to the sum of the magnitudes of its terms: that is what the order of additions can move.
"""

FAKE_QUANTIZE_DSCALE = 1e-6

BATCH_NORM_MEAN = 1e-6
BATCH_NORM_VAR = 5e-6
BATCH_NORM_SUMS = 1e-6  # dweight and dbias
BATCH_NORM_RSTD = 3e-7  # relative to itself, from the same variance

SOFTMAX_ENTROPY = 4e-6  # absolute, in nats, of an entropy of up to ln C = 10
SOFTMAX_CROSS_ENTROPY = 4e-6  # absolute, and 1e-6 of a larger one
SOFT_LIKELIHOOD_RATIO = 1e-5  # absolute: ln(p / (1 - p)) loses digits where p is near 0.99
SOFT_LIKELIHOOD_RATIO_SLOPE = 4e-7  # relative to 1 / (1 - p)^2, which is how the error of p appears in the slope
LOSS_GRADIENT = 2e-6  # relative to p times the slopes whose difference the gradient is

PACKED_LINEAR = 2e-6  # of floating activations, whose sums are fp32; of integer codes it is exact

SOFT_ROUND = 4e-7  # of h, in units of the scale; the rounding of code + h comes on top
SOFT_ROUND_SLOPE = 1e-6  # relative to the incoming gradient, the scale and beta
SOFT_ROUND_PENALTY = 1e-5  # relative: 1 - |2h - 1|^beta loses digits where h is near 0 or 1
SOFT_ROUND_STEP = 2e-5  # relative to the learning rate, for each step since the start

RECONSTRUCTION = 1e-6  # relative, of a sum of positive terms
RECONSTRUCTION_GRADIENT = 1e-5  # relative, against float64

GROUP_AFFINE_SUMS = 1e-6  # dweight and dbias

LAYER_NORM_STATISTICS = 1e-6  # the mean relative to that of the magnitudes, 1 / sqrt(var + eps) relative to itself
LAYER_NORM_SUMS = 1e-6  # dweight and dbias
LAYER_NORM_DX = 1e-6  # relative to the magnitudes of what dx is a difference of
