"""The one error of the kernels: it says who, what it got, what it expected and what to do."""

__all__ = ["KernelError"]


class KernelError(ValueError):
    """An op cannot work with the given arguments, or not on this machine."""
