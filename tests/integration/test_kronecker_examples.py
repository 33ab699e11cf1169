"""The Kronecker examples and benchmark as a user runs them, on tiny data."""

import os
import re
import subprocess
import sys

import pytest
import torch
from example_runs import run_example, write_idx
from paths import ROOT


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """96 + 40 images in MNIST's own files, each digit a bright row of its own."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, cases in (("train", 96), ("t10k", 40)):
        images = torch.randint(60, (cases, 28, 28), generator=generator)
        labels = torch.arange(cases) % 10
        images[torch.arange(cases), 2 * labels + 3] = 250
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return raw.parents[1]


def test_mnist(mnist, tmp_path):
    arguments = ["--data-root", mnist, "--neurons", 32, "--epochs", 12, "--max-steps", 20]
    done = run_example("kronecker_mnist", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "96 images, 616,225 products" in done.stdout
    percents = [float(x) for x in re.findall(r"([\d.]+) %", done.stdout)]
    assert len(percents) == 3
    assert min(percents) > 90  # so clear a digit is learnt by all three
    picture = tmp_path / "runs" / "kronecker_mnist" / "accuracy.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_pairs(tmp_path):
    done = run_example("kronecker_pairs", "--max-steps", 30, "--pairs", 200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "160 points of 128 x 96 = 12288), 40 pairs held out" in done.stdout
    assert done.stdout.count("R² =") == 2
    assert (tmp_path / "runs/kronecker_pairs/pairs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_benchmark(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "kronecker.py"), "--quick"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--threads", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nn.Bilinear" in done.stdout
    assert "m grows" in done.stdout


@pytest.mark.slow
def test_pairs_beat_the_linear_model(tmp_path):
    done = run_example("kronecker_pairs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ridge, network = (float(x) for x in re.findall(r"R² = ([\d.-]+)", done.stdout))
    assert network > ridge + 0.05


@pytest.mark.slow
@pytest.mark.skipif("TORCH_HF_DATA" not in os.environ, reason="TORCH_HF_DATA names no data root")
def test_mnist_products_reach_95_percent(tmp_path):
    arguments = ["--data-root", os.environ["TORCH_HF_DATA"]]
    done = run_example("kronecker_mnist", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"([\d.]+) %", done.stdout)[0]) > 95
