"""The old name of :mod:`torch_hf.sampling.growth`; deprecated."""

from torch_hf.sampling.growth import GeometricGrowth, Growth, RatioGrowth, VarianceGrowth

__all__ = ["GeometricGrowth", "Growth", "RatioGrowth", "VarianceGrowth"]
