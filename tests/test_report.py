"""A report as one readable line, for every way a step may end; its fields stay in the repr."""

import dataclasses

import pytest
import torch

from torch_hf import HFOptimizer
from torch_hf.report import StepReport, Stop

REPORT = StepReport(
    7, 2.0, 1.5, True, 0.9, 1e-2, 0.5, 1.0, 3, Stop.MAX_ITER, 13, 2, 64, 64, "double_backward"
)
CG = {"solver": "cg", "seconds": {"total": 0.25}}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            CG,
            "step 7: loss 2 -> 1.5 on 64 cases, solver cg, 3 iterations (cg_max_iter reached), "
            "damping 0.01, reduction ratio 0.90, 0.25 s",
        ),
        (
            {"solver": "exact", "batch_cases": 1},
            "step 7: loss 2 -> 1.5 on 1 case, solver exact, damping 0.01, reduction ratio 0.90",
        ),
        (
            {"accepted": False, "step_length": 0.0, "reason": "the gradient is zero"},
            "step 7: rejected, loss 2 on 64 cases, damping 0.01, reduction ratio 0.90; "
            "the gradient is zero",
        ),
        (
            {"accepted": False, "converged": True, "reduction_ratio": float("nan")},
            "step 7: converged at loss 2 on 64 cases, damping 0.01",
        ),
        (
            {"step_length": 0.8},
            "step 7: loss 2 -> 1.5 on 64 cases, damping 0.01, reduction ratio 0.90, "
            "step length 0.8",
        ),
    ],
)
def test_a_report_prints_as_one_line(change, line):
    report = dataclasses.replace(REPORT, **change)
    assert str(report) == f"{report}" == line
    assert repr(report).startswith("StepReport(step=7, loss=2.0, ")


def test_reports_of_a_run_print(capsys):
    w = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    optimizer = HFOptimizer([w])
    for _ in range(30):
        optimizer.step(lambda: (w - 1).square().mean() + 1)
        print(optimizer.last_report)
    flat = HFOptimizer([w])
    flat.step(lambda: (0 * w).square().mean())  # nothing to do in the very first step
    print(flat.last_report)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 31
    assert lines[0].startswith("step 1: loss 5 -> ")
    assert "converged at loss 1 " in lines[29]
    assert lines[30].startswith("step 1: rejected, loss 0 on ")
