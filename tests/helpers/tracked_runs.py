"""A report, a rejected one, and the rows of a run."""

from __future__ import annotations

import dataclasses
import math

from torch_hf.report import StepReport, Stop

REPORT = StepReport(
    step=1,
    loss=2.0,
    new_loss=1.5,
    accepted=True,
    reduction_ratio=0.9,
    damping=1e-2,
    gradient_norm=0.5,
    step_length=1.0,
    cg_iterations=12,
    cg_stop=Stop.PROGRESS,
    products=13,
    evaluations=2,
    batch_cases=64,
    curvature_cases=32,
    engine="double_backward",
    seconds={"total": 0.1, "products": 0.05},
)
REJECTED = dataclasses.replace(
    REPORT, step=2, accepted=False, reduction_ratio=math.nan, reason="the loss rose"
)
