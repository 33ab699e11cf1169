"""Runs the examples as a user does, each a process of its own."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import torch
from paths import ROOT

from torch_hf.tracking import read_csv


def run_example(name, *arguments, cwd):
    """Run ``examples/<name>.py`` in ``cwd``, where its results then lie in ``runs/<name>``."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def drawn(folder, name):
    """Whether a picture lies there."""
    return (folder / name).read_bytes().startswith(b"\x89PNG")


def three_steps(name, *arguments, cwd, picture="training.png"):
    """Run an example for so long: the process, and the columns of its CSV file."""
    done = run_example(name, "--max-steps", 3, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    folder = cwd / "runs" / name
    columns = read_csv(folder / "training.csv")
    assert columns["step"] == [1, 2, 3]
    assert drawn(folder, picture)
    return done, columns


def falls(columns):
    """Whether no step of a run left a higher loss on its data."""
    return all(new <= old for old, new in zip(columns["loss"], columns["new_loss"], strict=True))


def write_idx(path, array):
    """The format of MNIST's files: unsigned bytes, dimensions big-endian."""
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    path.write_bytes(header + array.to(torch.uint8).numpy().tobytes())
