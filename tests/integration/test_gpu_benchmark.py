"""``make gpu`` where there is no GPU, its dry run, and the summary that it prints."""

import json
import subprocess
import sys

import pytest
import torch
from paths import ROOT

GPU = ROOT / "benchmarks" / "gpu.py"


def ran(folder, *arguments):
    # One thread: with as many as cores, beside other tests, they wait for each other.
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment["HOME"] = str(folder)
    return subprocess.run(
        [sys.executable, str(GPU), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path):
    done = ran(tmp_path)
    assert done.returncode == 2
    assert "No CUDA GPU was found" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_dry_run_writes_one_json(tmp_path):
    done = ran(tmp_path, "--device", "cpu", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "runs" / "gpu" / "gpu-cpu.json").read_text())
    assert set(found) == {"environment", "tests", "nccl", "products"}
    assert found["tests"]["failures"] == found["tests"]["errors"] == 0 < found["tests"]["tests"]
    assert [row["network"] for row in found["products"]] == ["MLP", "LSTM"]
    assert all(row["product_in_gradients"] > 0 for row in found["products"])
    assert "product_in_gradients" in done.stdout and "1 ranks" in done.stdout


PARTS = """
import sys
import gpu

late = gpu._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.0)
assert late["exit"] == 124, late
bad = gpu._run([sys.executable, "-c", "raise SystemExit(3)"], 60.0)
assert bad["exit"] == 3, bad
found = {"tests": {"exit": 0}, "nccl": {"1 ranks": bad}, "products": []}
assert gpu.failed(found)
assert not gpu.failed(found | {"nccl": {"1 ranks": {"exit": 0}}})
assert gpu.failed(found | {"nccl": {}, "products": [{"error": "no time left"}]})
good = found | {"nccl": {}}
assert not gpu.failed(good | {"training": {"exit": 0}})
assert gpu.failed(good | {"training": {"exit": 1}})
assert gpu.failed(good | {"training": {"error": "3 s left, 60 needed"}})
assert gpu.failed(good | {"training": {"exit": 0, "error": "MNIST was not found"}})
"""


def test_a_part_that_hangs_or_fails_is_a_line(tmp_path):
    paths = f"{ROOT}:{GPU.parent}"  # in a process of its own: other folders have a common.py, too
    environment = {"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", PARTS], cwd=tmp_path, env=environment, check=True)
