"""Preconditioners for CG: an implicit L-BFGS inverse from CG's own pairs, and its bases."""

from torch_hf.preconditioner.choose import make_preconditioner
from torch_hf.preconditioner.kfac import KroneckerPreconditioner
from torch_hf.preconditioner.lbfgs import LBFGSPreconditioner
from torch_hf.preconditioner.protocol import Curvature, Preconditioner
from torch_hf.preconditioner.simple import DiagonalPreconditioner, NoPreconditioner

__all__ = [
    "Curvature",
    "DiagonalPreconditioner",
    "KroneckerPreconditioner",
    "LBFGSPreconditioner",
    "NoPreconditioner",
    "Preconditioner",
    "make_preconditioner",
]
