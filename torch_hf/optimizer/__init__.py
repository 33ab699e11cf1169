"""The story of one step: :class:`HFOptimizer`, what it keeps, and what it puts back."""

from torch_hf.optimizer.hf import HFOptimizer

__all__ = ["HFOptimizer"]
