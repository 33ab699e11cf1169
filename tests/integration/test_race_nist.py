"""NIST's nonlinear regressions: models against the certified sums, read from the shared files."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

FOLDER = Path(os.environ.get("TORCH_HF_DATA", ROOT.parent / "shared" / "data")) / "nist"


@pytest.fixture(scope="module")
def nist():
    """The loader alone: the other modules of the race need more packages."""
    path = ROOT / "benchmarks" / "race" / "nist.py"
    spec = importlib.util.spec_from_file_location("race_nist", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["race_nist"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["race_nist"]


SMALL = (
    """NIST/ITL StRD
Dataset Name:  DanWood           (DanWood.dat)
"""
    + "\n" * 38
    + """  b1 =   1           0.7           7.6886226176E-01  1.8281973860E-02
  b2 =   5           4             3.8604055871E+00  5.1726610913E-02

Residual Sum of Squares:                    4.3173084083E-03
"""
    + "\n" * 15
    + """Data:  y              x
      2.138E0        1.309E0
      3.421E0        1.471E0
      3.597E0        1.490E0
      4.340E0        1.565E0
      4.882E0        1.611E0
      5.660E0        1.680E0
"""
)


def sum_of_squares(problem):
    return float((problem.model(problem.certified, problem.x) - problem.y).square().sum())


def test_a_file_is_read(nist, tmp_path):
    (tmp_path / "DanWood.dat").write_text(SMALL)
    problem = nist.load(tmp_path / "DanWood.dat")
    assert [start.tolist() for start in problem.starts] == [[1.0, 5.0], [0.7, 4.0]]
    assert problem.x.tolist() == [1.309, 1.471, 1.490, 1.565, 1.611, 1.680]
    assert sum_of_squares(problem) == pytest.approx(problem.residual_sum, rel=1e-9)


def test_digits_are_those_of_the_worst_parameter(nist, tmp_path):
    (tmp_path / "DanWood.dat").write_text(SMALL)
    problem = nist.load(tmp_path / "DanWood.dat")
    off = problem.certified * torch.tensor([1 + 1e-4, 1.0], dtype=torch.float64)
    assert problem.digits(off) == pytest.approx(4.0, abs=1e-6)
    assert problem.digits(problem.certified) == nist.CERTIFIED_DIGITS
    assert problem.digits(-problem.certified) == 0.0
    assert problem.digits(problem.certified * torch.nan) == 0.0


def test_another_file_is_refused(nist, tmp_path):
    with pytest.raises(
        ValueError, match=r"must be one of NIST's nonlinear regressions, got x\.dat"
    ):
        nist.load(tmp_path / "x.dat")


@pytest.mark.skipif(not FOLDER.exists(), reason="NIST's files are not at hand")
def test_models_have_the_certified_sums(nist):
    problems = nist.load_all(FOLDER)
    assert len(problems) == 27
    for problem in problems:
        if problem.name == "Lanczos1":  # no noise: 1e-25 is below what eleven digits give
            assert sum_of_squares(problem) < 1e-19
        else:
            certified = pytest.approx(problem.residual_sum, rel=1e-9)
            assert sum_of_squares(problem) == certified, problem.name
