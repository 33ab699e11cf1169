"""examples/distributed.py under torchrun, with processes that are killed and that hang."""

import shutil
import sys

import pytest
import torch
from paths import ROOT
from processes import said_by
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from torch_hf.tracking import read_csv

pytestmark = pytest.mark.slow

EXAMPLE, FAULTY = (
    ROOT / "examples" / "distributed.py",
    ROOT / "tests" / "helpers" / "faulty_rank.py",
)
#: With few CG iterations and in float64 rounding does not grow, so that runs can be compared.
OPTIONS = ["--device", "cpu", "--double", "--cg-max-iter", "5", "--save-every", "2"]
#: Nine steps are an epoch of seven batches and two of the next, which are larger.
SHORT, LONG = 6, 9
#: The losses of the same steps on one and on two processes differ by rounding, 1e-15 measured.
TOLERANCE = 1e-12


def run(folder, *arguments, ranks=1, script=EXAMPLE, elastic=(), limit=200, **environment):
    """What a user sees of ``torchrun script arguments``; without torchrun for one rank."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += elastic
    command += [str(script), *OPTIONS, "--out", str(folder), *map(str, arguments)]
    return said_by(command, limit, PYTHONPATH=str(ROOT), **environment)


def trained(folder, *arguments, **options):
    code, said = run(folder, *arguments, **options)
    assert code == 0, said
    return folder, said


def steps(folder):
    """All columns of a run but the seconds."""
    columns = read_csv(folder / "training.csv")
    return {k: v for k, v in columns.items() if not k.startswith("seconds") and k != "elapsed"}


def last_state(folder, step):
    saved = folder / "checkpoints"
    assert [path.name for path in saved.iterdir()] == [f"{step:08d}"], "the last one alone"
    dcp_to_torch_save(saved / f"{step:08d}", folder / "last.pt")
    return torch.load(folder / "last.pt", weights_only=True)


def same(a, b):
    """Equality to the last bit; nan is nan."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("one"), "--max-steps", LONG)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("two"), "--max-steps", SHORT, ranks=2)[0]


def test_two_processes_take_the_steps_of_one(one, two):
    found, truth = steps(two), steps(one)
    for name in ("loss", "new_loss", "damping", "batch_cases", "cg_iterations"):
        assert found[name] == pytest.approx(truth[name][:SHORT], rel=TOLERANCE)
    assert (two / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_rank_comes_back_and_nothing_has_happened(two, tmp_path):
    """Killed in the fourth step: the third, which is after the checkpoint, is taken once more."""
    fault = {"FAULT": "kill", "FAULTY_STEP": "4", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    restarts = ["--max-restarts=1"]
    arguments = ["--max-steps", SHORT]
    found, said = trained(tmp_path, *arguments, ranks=2, script=FAULTY, elastic=restarts, **fault)
    assert "rank 1: kill in step 4" in said
    assert "exitcode: -9" in said
    same(steps(found), steps(two))
    states = [last_state(folder, SHORT) for folder in (found, two)]
    for name in ("model", "sampler"):
        same(states[0][name], states[1][name])
    same(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])


def test_restarts_want_a_fresh_store(tmp_path):
    code, said = run(tmp_path, RANK="0", TORCHELASTIC_MAX_RESTARTS="1")  # as torchrun sets them
    assert code == 1
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment" in said


def test_a_hung_rank_is_named(tmp_path):
    fault = {"FAULT": "hang", "FAULTY_STEP": "1"}
    arguments = ["--max-steps", SHORT, "--timeout", 5]
    code, said = run(tmp_path, *arguments, ranks=3, script=FAULTY, **fault)
    assert code == 1
    assert "rank 1: hang in step 1" in said
    assert "PeerError: A collective of the step failed on rank 0 of 3" in said
    assert "[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 10000 ms" in said


def test_a_run_of_two_processes_is_continued_by_one(one, two, tmp_path):
    """Its batches are those that two would have taken, also in the next epoch."""
    shutil.copytree(two, tmp_path / "copy")
    found, _ = trained(tmp_path / "copy", "--max-steps", LONG)
    ours, truth = steps(found), steps(one)
    assert truth["batch_cases"] == [180] * 7 + [216] * 2
    for name in ("loss", "new_loss", "damping", "batch_cases", "cg_iterations"):
        assert ours[name] == pytest.approx(truth[name], rel=TOLERANCE)
