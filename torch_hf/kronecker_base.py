"""The old name of :mod:`torch_hf.preconditioner.kfac`; deprecated."""

from torch_hf.preconditioner.kfac import KroneckerPreconditioner as KroneckerPreconditioner
