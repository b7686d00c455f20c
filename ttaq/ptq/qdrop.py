"""QDrop (Wei et al., arXiv 2203.05740): BRECQ in which half of the elements of every activation stay float.

Dropped are elements of the unit's input and of every quantized tensor in it, its output included. Differs from the
paper: batch norm stays a layer of its own, with its source statistics, which is the same problem.
"""

from __future__ import annotations

from ttaq.ptq.settings import Reconstruction

__all__ = ["QDROP"]

QDROP = Reconstruction()
