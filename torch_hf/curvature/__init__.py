"""Curvature products ``G v`` and ``H v``, exact where autograd differentiates twice."""

from torch_hf.curvature.operators import (
    GaussNewtonOperator,
    HessianOperator,
    ObjectiveOperator,
)

__all__ = ["GaussNewtonOperator", "HessianOperator", "ObjectiveOperator"]
