"""A file that is saved while the process is killed is the old one or the new one."""

import os
import signal
import time

import pytest
import torch
from guarantees import bits, problem, same
from torch.nn import functional as F

from torch_hf import GrowingBatchSampler, HFOptimizer, save_atomically

pytestmark = pytest.mark.usefixtures("seeded")


# Killed at random moments


def train(folder, steps):
    """Trains from the checkpoint in a folder, if there is one, and writes one every step."""
    torch.manual_seed(0)
    model, x, y = problem()
    optimizer = HFOptimizer(model.parameters(), cg_max_iter=5)
    sampler = GrowingBatchSampler(16, batch_size=4, growth=1.3, seed=3, drop_last=True)
    path = folder / "checkpoint.pt"
    done = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sampler.load_state_dict(saved["sampler"])
        done = saved["steps"]
    while done < steps:
        for indices in sampler:
            optimizer.step(lambda i=indices: F.mse_loss(model(x[i]), y[i]))
            done += 1
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "sampler": sampler.state_dict(),
                "steps": done,
            }
            save_atomically(saved, path)
            if done == steps:
                break
        else:
            sampler.set_epoch(sampler.epoch + 1)
    return bits(model)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_twenty_kills_change_nothing(tmp_path):
    steps = 200
    (tmp_path / "whole").mkdir()
    start = time.monotonic()
    expected = train(tmp_path / "whole", steps)
    span = (time.monotonic() - start) / 20  # so that the kills fall all over the run
    folder = tmp_path / "killed"
    folder.mkdir()
    wait = torch.rand(20, generator=torch.Generator().manual_seed(0)) * span
    kills = 0
    for seconds in wait.tolist():
        child = os.fork()
        if child == 0:
            try:
                train(folder, steps)
            finally:
                os._exit(0)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if (folder / "checkpoint.pt").exists():
            torch.load(folder / "checkpoint.pt", weights_only=True)
    assert kills == 20
    assert same(train(folder, steps), expected)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_atomically({"step": 1}, path)
    with pytest.raises(AttributeError):
        save_atomically({"step": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
