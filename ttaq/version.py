"""The version of ttaq, readable whether or not the package is installed: a GPU machine may only have its source."""

__all__ = ["__version__"]

__version__ = "0.1.0"
