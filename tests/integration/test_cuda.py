"""The same trajectory on CPU and CUDA, float64; skipped where there is no GPU."""

import pytest
import torch
from problems import CASES

from torch_hf import HFOptimizer, LBFGSPreconditioner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def trajectory(case, device, make_preconditioner):
    model = case.model().to(device)
    inputs = [x.to(device) for x in case.inputs]
    targets = [y.to(device) for y in case.targets]

    def closure():
        optimizer.zero_grad()
        outputs = model(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        loss = case.criterion(*outputs, *targets)
        loss.backward()
        return loss

    # few CG iterations: late ones amplify rounding, which differs from device to device
    optimizer = HFOptimizer(
        model.parameters(),
        damping=1.0,
        weight_decay=1e-3,
        cg_max_iter=6,
        preconditioner=make_preconditioner(),
    )
    losses = [float(optimizer.step(closure)) for _ in range(5)]
    return [*losses, optimizer.last_report.new_loss]


@pytest.mark.parametrize(
    "make", [lambda: "none", lambda: LBFGSPreconditioner(4)], ids=["none", "lbfgs"]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cpu_and_cuda_agree(case, make):
    assert trajectory(case, "cuda", make) == pytest.approx(trajectory(case, "cpu", make), rel=1e-6)
