"""Two real processes as each launcher starts them, beside one process on all the data."""

import importlib.util
import json
import os
import socket
import sys

import pytest
import torch
from launched import same_run
from paths import ROOT
from processes import said_by

from torch_hf import HFOptimizer
from torch_hf.tracking import read_csv

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "tests" / "helpers" / "launched"
#: Losses of one and of two processes differ by rounding; 2e-16 measured.
TOLERANCE = 1e-12


def launched(folder, script, *command, limit=240, **environment):
    """What two processes came to, rank 0 first."""
    paths = os.pathsep.join([str(ROOT), str(SCRIPTS)])
    line = [*command, str(SCRIPTS / script), str(folder)]
    code, said = said_by(line, limit, PYTHONPATH=paths, **environment)
    assert code == 0, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    """Losses, cases and values of one process on all the data."""
    network = same_run.make_network()
    optimizer = HFOptimizer(network.parameters(), **same_run.OPTIONS)
    seen = same_run.train(network, optimizer, same_run.make_loader())
    return seen, [p.detach().reshape(-1) for p in network.parameters()]


def assert_the_run_of_one(found, alone):
    seen, values = alone
    assert found[0] == found[1], "the ranks differ"
    assert found[0]["cases"] == [cases for _, cases in seen] == [17, 17, 17, 22, 22, 7]
    assert found[0]["losses"] == pytest.approx([loss for loss, _ in seen], rel=TOLERANCE)
    for one, other in zip(found[0]["values"], values, strict=True):
        found_values = torch.tensor(one, dtype=torch.float64)
        torch.testing.assert_close(found_values, other, rtol=TOLERANCE, atol=TOLERANCE)


def code_block(page, beginning):
    """The block of a page's code that begins so."""
    text = (ROOT / "docs" / page).read_text()
    start = text.index(beginning)
    return text[start : text.index("```", start)]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_the_slurm_script_on_two_nodes_that_are_this_machine(tmp_path):
    """Slurm's two commands are stand-ins; the script is the page's, with a process a node."""
    script = code_block("distributed.md", "#!/bin/bash\n#SBATCH --nodes=4")
    small = "--device cpu --double --cg-max-iter 5 --max-steps 3 --save-every 1"
    for old, new in (
        ("--nproc-per-node=8", "--nproc-per-node=1"),
        ("29500", str(free_port())),
        ("torchrun ", f"{sys.executable} -m torch.distributed.run "),
        ("examples/distributed.py", f"{ROOT}/examples/distributed.py {small}"),
    ):
        assert old in script
        script = script.replace(old, new)
    tools = tmp_path / "bin"
    tools.mkdir()
    srun = '#!/bin/bash\n"$@" & "$@" & wait -n && wait -n\n'  # the same line on each node
    for name, text in (("srun", srun), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    of_job = {"NNODES": "2", "JOB_ID": "7", "JOB_NAME": "digits", "JOB_NODELIST": "this[0-1]"}
    slurm = {f"SLURM_{k}": v for k, v in of_job.items()} | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    path = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    code, said = said_by(["bash", "-c", script], 240, **slurm, **path)
    assert code == 0, said
    columns = read_csv(tmp_path / "runs" / "digits" / "training.csv")
    assert len(columns["loss"]) == 3 and columns["loss"][-1] < columns["loss"][0]
    parts = {path.name for path in (tmp_path / "runs" / "digits").rglob("*.distcp")}
    assert any(name.startswith("__1_") for name in parts), "the second node wrote its own"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NAMES = {
    "by_accelerate.py": ("accelerate", TORCHRUN),
    "by_lightning.py": ("lightning", [sys.executable]),
    "by_ray.py": ("ray", [sys.executable]),
}


@pytest.mark.parametrize("script", NAMES)
def test_two_processes_take_the_steps_of_one(script, alone, tmp_path):
    package, command = NAMES[script]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert_the_run_of_one(launched(tmp_path, script, *command), alone)
