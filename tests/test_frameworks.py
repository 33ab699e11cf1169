"""Every Python block of docs/frameworks.md runs, in order, as a reader would paste them."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning asks isinstance
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed"),  # one process: no group
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]
PAGE = Path(__file__).parents[1] / "docs" / "frameworks.md"


def test_the_blocks_run_in_order(capsys):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    names = {"__name__": "page"}
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    finally:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert capsys.readouterr().out.count("StepReport(") == 2
    assert "HFTrainer" in names
