"""Kronecker SGD: exact SGD on Kronecker inputs, at a cost free of their dimension.

After arXiv 2305.08001 (version 1: Song & Ye; later: Song & Yue). :class:`KroneckerFactors` holds
the data, :class:`KroneckerLinear` is a layer on it, :class:`KroneckerSGD` trains models with such
layers; :class:`CorrelationTree` finds the active neurons of a shifted ReLU, and
:class:`TwoLayerNetwork` is the paper's network.
"""

from torch_hf.kronecker.factors import KroneckerFactors
from torch_hf.kronecker.layer import ActiveNeurons, KroneckerLinear
from torch_hf.kronecker.network import TwoLayerNetwork
from torch_hf.kronecker.sgd import KroneckerSGD
from torch_hf.kronecker.tree import ActiveSet, CorrelationTree

__all__ = [
    "ActiveNeurons",
    "ActiveSet",
    "CorrelationTree",
    "KroneckerFactors",
    "KroneckerLinear",
    "KroneckerSGD",
    "TwoLayerNetwork",
]
