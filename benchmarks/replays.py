"""What a product costs launched kernel by kernel, recorded, and replayed as one CUDA graph.

python benchmarks/replays.py

Beside each product the vector operations of a CG iteration, with and without a read of its numbers
by the host. It needs a CUDA GPU, and exits with 2 without one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import print_table
from gpu import NETWORKS, milliseconds
from torch.nn import functional as F

from torch_hf.curvature import GaussNewtonOperator
from torch_hf.curvature.cuda_graph import Recorder


def iteration(product: Callable[[], torch.Tensor], v: torch.Tensor, reads: bool) -> Any:
    """A product and the vector operations of a CG iteration, which leave all as it was."""
    d, r, p = (torch.randn_like(v) for _ in range(3))

    def run() -> None:
        found = product()
        numbers = torch.stack([torch.dot(found, v), torch.dot(found, d), torch.dot(v, v)])
        d.addcmul_(found, numbers[0] * 0)
        r.addcmul_(found, numbers[1] * 0)
        torch.add(d, r, alpha=0.0, out=p)
        if reads:
            numbers.tolist()

    return run


def row(make: Callable[[], Any], device: torch.device) -> list[str]:
    """Milliseconds of a network's gradient, product, recording, replay and iterations."""
    torch.manual_seed(0)
    model, x, y = make()
    model, x, y = model.to(device), x.to(device), y.to(device)
    params, recorder = list(model.parameters()), Recorder()

    def closure() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    gradient = milliseconds(lambda: torch.autograd.grad(closure(), params), device, 10)
    with recorder.stream(device, alone=True):
        operator = GaussNewtonOperator.from_closure(closure, params)
        v = torch.randn(operator.shape[0], device=device)
        launched = milliseconds(lambda: operator(v), device, 10)
        start = time.perf_counter()
        recording = recorder.record(operator, v)
        recorded = 1e3 * (time.perf_counter() - start)
        if recording is None:
            return [f"{gradient:.2f}", f"{launched:.2f}", "failed", "", "", "", ""]
        kept = recording

        def replayed() -> torch.Tensor:
            kept.replay()
            return kept.result

        found = milliseconds(replayed, device, 20)
        rest = [milliseconds(iteration(replayed, v, reads), device, 20) for reads in (True, False)]
        truth = operator(v)
        error = float((replayed() - truth).norm() / truth.norm())
    numbers = [gradient, launched, recorded, found, *rest]
    return [*(f"{number:.2f}" for number in numbers), f"{error:.0e}"]


def main() -> int:
    if not torch.cuda.is_available():
        print("No CUDA GPU was found, and graphs of kernels need one.")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [[name, *row(make, device)] for name, make in NETWORKS.items()]
    header = ["network", "gradient", "product", "recording", "replayed", "iteration, read"]
    print_table(
        f"milliseconds on {torch.cuda.get_device_name(device)}, torch {torch.__version__}",
        [*header, "not read", "difference"],
        rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
