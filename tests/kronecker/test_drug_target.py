"""The example of drugs and targets, on a small table, and its baseline against dense algebra."""

import importlib.util
import os
from pathlib import Path

import numpy
import pytest
import torch
from basics import normal
from example_runs import run_example
from torch.testing import assert_close

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("pairs", EXAMPLES / "pairs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["random pairs", "cold drugs"])
def test_the_vec_trick_solves_the_kernel_equations(example, kind):
    torch.manual_seed(0)
    a, b, y = normal(1, 9, 4), normal(2, 7, 5), normal(3, 9, 7)
    drugs, targets = a @ a.T, b @ b.T
    held = example.split(kind, y.shape)
    assert 0.1 < float(held.double().mean()) < 0.25
    kernel, known = torch.kron(drugs, targets), (~held).flatten()
    gram = kernel[known][:, known] + 0.5 * torch.eye(int(known.sum()))
    truth = kernel[:, known] @ torch.linalg.solve(gram, y.flatten()[known])
    found = example.ridge(drugs, targets, y, held, penalty=0.5)
    assert_close(found.flatten(), truth, rtol=0, atol=1e-3)


def test_concordance(example):
    truth = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert example.concordance(truth, truth) == 1.0
    assert example.concordance(-truth, truth) == 0.0
    assert example.concordance(torch.zeros(4), truth) == 0.5
    assert example.concordance(torch.tensor([1.0, 0.0, 2.0, 3.0]), truth) == 0.8


def test_as_a_user_runs_it(tmp_path):
    a, b = normal(1, 12, 4), normal(2, 18, 5)
    kd = 10 ** (4 - (a[:, :1] @ b[:, :1].T).tanh())
    numpy.savez(
        tmp_path / "davis.npz",
        kd_nanomolar=kd.numpy(),
        drugs=(a @ a.T).numpy(),
        targets=(b @ b.T).numpy(),
    )
    done = run_example("drug_target", "--max-steps", 20, "--width", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("network, KroneckerSGD") == done.stdout.count("kernel ridge") == 2
    assert (tmp_path / "runs/drug_target/pairs.png").read_bytes().startswith(b"\x89PNG")
    missing = run_example("drug_target", "--data", "nothing.npz", cwd=tmp_path)
    assert missing.returncode == 2
    assert "nothing.npz is not there" in missing.stderr


@pytest.mark.slow
@pytest.mark.skipif("TORCH_HF_DAVIS" not in os.environ, reason="TORCH_HF_DAVIS names no file")
def test_the_network_is_level_with_the_ridge_on_davis(tmp_path):
    done = run_example("drug_target", "--data", os.environ["TORCH_HF_DAVIS"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line[14:38].strip(): line.split()[-2:] for line in done.stdout.splitlines()[1:5]}
    error, concordance = map(float, rows["network, KroneckerSGD"])
    assert error < 0.245
    assert concordance > 0.885
