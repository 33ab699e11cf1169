"""Every Python block of the README runs, in order, as a reader would paste them."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_blocks_of_the_readme_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block saves a checkpoint
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    report = names["optimizer"].last_report
    assert report.accepted
    assert report.new_loss < report.loss
    assert "StepReport(" in capsys.readouterr().out
