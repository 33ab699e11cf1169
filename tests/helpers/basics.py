"""What many tests begin and end with: numbers from a seed, and a comparison of vectors."""

import torch
from torch import Tensor, nn


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64, the same at each call; the global generator rests."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def positive_definite(seed: int, n: int) -> Tensor:
    """A matrix ``(n, n)`` with eigenvalues of 1 and above."""
    root = normal(seed, n, n)
    return root @ root.T + torch.eye(n)


def assert_same(found: Tensor, truth: Tensor, rtol: float = 1e-10) -> None:
    """Vectors or matrices whose difference is small in Euclidean norm."""
    assert torch.linalg.norm(found - truth) <= rtol * torch.linalg.norm(truth)


def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]
