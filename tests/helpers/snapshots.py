"""All that a step may change, and a comparison to the bit."""

import copy
import random
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from torch_hf import HFOptimizer


def snapshot(model: nn.Module, optimizer: HFOptimizer) -> dict[str, Any]:
    """All that a step may change, copied."""
    return copy.deepcopy(
        {
            "parameters": [p.detach() for p in model.parameters()],
            "buffers": dict(model.named_buffers()),
            "gradients": [p.grad for p in model.parameters()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "torch": torch.get_rng_state(),
            "numpy": numpy.random.get_state(),
            "python": random.getstate(),
            "state": optimizer.state_dict(),
            "report": optimizer.last_report,
        }
    )


def assert_identical(found: Any, truth: Any, path: str = "") -> None:
    """To the bit, in any nested structure."""
    if isinstance(truth, Tensor):
        assert found.dtype == truth.dtype, path
        assert torch.equal(found.nan_to_num(), truth.nan_to_num()), path
        assert torch.equal(found.isnan(), truth.isnan()), path
    elif isinstance(truth, numpy.ndarray):
        assert (found == truth).all(), path
    elif isinstance(truth, dict):
        assert list(found) == list(truth), path
        for key in truth:
            assert_identical(found[key], truth[key], f"{path}/{key}")
    elif isinstance(truth, (list, tuple)):
        assert len(found) == len(truth), path
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            assert_identical(a, b, f"{path}/{i}")
    else:
        assert repr(found) == repr(truth), path
