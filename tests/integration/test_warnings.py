"""Which warnings fail a test: the project's own and torch's, whatever other packages warn of."""

import subprocess
import sys
import warnings

import pytest
import torch
from paths import ROOT

from torch_hf import HFOptimizer

FAILING = ["torch_hf.optimizer.hf", "torch_hf", "torch", "torch.nn.modules.module", "page"]
FAILING += ["test_steps", "conftest", "problems", "processes"]
SHOWN = ["lightning.pytorch.trainer", "transformers.trainer", "accelerate", "sklearn.datasets"]
SHOWN += ["matplotlib.figure", "torchvision", "torchdata.stateful_dataloader", "numpy"]


def warn(module, category=DeprecationWarning):
    warnings.warn_explicit("this goes away", category, "file.py", 1, module=module)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, UserWarning])
@pytest.mark.parametrize("module", FAILING)
def test_a_warning_of_ours_or_of_torch_fails(module, category):
    with pytest.raises(category, match="goes away"):
        warn(module, category)


@pytest.mark.parametrize("module", SHOWN)
def test_a_warning_of_another_package_is_shown(module):
    with warnings.catch_warnings(record=True) as shown:
        warn(module)
    assert [str(warning.message) for warning in shown] == ["this goes away"]


def test_a_deprecation_that_torch_reports_at_its_caller_fails():
    with pytest.raises(FutureWarning, match="deprecated"):
        torch.nn.utils.weight_norm(torch.nn.Linear(2, 2))


def test_the_optimizers_own_warning_fails_whoever_called_it():
    """Raised at the line that calls ``step``, which may lie in a framework."""
    w = torch.nn.Parameter(torch.ones(1))
    optimizer, factor = HFOptimizer([w]), torch.ones(())
    framework = {"__name__": "lightning.loop", "step": optimizer.step}
    exec(
        "def steps(closure, number):\n    for _ in range(number):\n        step(closure)", framework
    )
    framework["steps"](lambda: (factor * w).square().sum(), 1)
    factor.fill_(float("nan"))
    with pytest.raises(RuntimeWarning, match="HFOptimizer has rejected"):
        framework["steps"](lambda: (factor * w).square().sum(), 20)


def test_a_run_of_pytest_is_red_with_such_a_warning(tmp_path):
    """The same settings, given to a run of their own over two files."""
    red = "import warnings\n\ndef test_red():\n    warnings.warn('old', DeprecationWarning)\n"
    (tmp_path / "test_red.py").write_text(red)
    (tmp_path / "other.py").write_text(red.replace("test_red", "old"))
    (tmp_path / "test_green.py").write_text("import other\n\ndef test_green():\n    other.old()\n")
    options = ["-q", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "1 failed, 1 passed, 1 warning" in done.stdout
