"""The ops in plain PyTorch: what CPU tensors run, and what the kernels are compared with."""
