"""How far a kernel may be from its reference, in one place. What is not listed is equal bit for bit.

A sum is compared relative to the sum of the magnitudes of its terms: that is what the order of additions can move.
"""

FAKE_QUANTIZE_DSCALE = 1e-6

BATCH_NORM_MEAN = 1e-6
BATCH_NORM_VAR = 5e-6
BATCH_NORM_SUMS = 1e-6  # dweight and dbias
BATCH_NORM_RSTD = 3e-7  # relative to itself, from the same variance

SOFTMAX_ENTROPY = 2e-6  # absolute, in nats, of an entropy of up to ln C = 10
SOFTMAX_ENTROPY_GRADIENT = 2e-6  # relative to p (1 + |ln p| + H)
