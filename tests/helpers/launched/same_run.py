"""What the scripts that launchers start share: data, a network, and what a run came to."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_hf import GrowingBatchSampler

EPOCHS = 2
#: Three batches an epoch, of an odd number of cases, larger ones in the second.
CASES, BATCH, GROWTH = 51, 17, 1.3
OPTIONS = {"cg_max_iter": 5}


def make_data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(CASES, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] * x[:, 2] > 0).long())


def make_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_loader(ranks=1, rank=0):
    sampler = GrowingBatchSampler(CASES, BATCH, GROWTH, num_replicas=ranks, rank=rank)
    return DataLoader(make_data(), batch_sampler=sampler)


def train(network, optimizer, loader, backward=torch.Tensor.backward):
    """Losses and cases of all steps; ``optimizer`` may be wrapped."""
    own, seen = getattr(optimizer, "optimizer", optimizer), []
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_epoch(epoch)
        for x, y in loader:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(network(x), y)
                backward(loss)
                return loss

            optimizer.step(closure)
            seen.append((own.last_report.loss, own.last_report.batch_cases))
    return seen


def keep(rank, network, seen, folder=None):
    """Writes what a rank came to into the folder that the launcher was given."""
    values = [p.detach().reshape(-1).tolist() for p in network.parameters()]
    content = {"losses": [s[0] for s in seen], "cases": [s[1] for s in seen], "values": values}
    path = Path(folder or sys.argv[1]) / f"{rank}.json"
    path.write_text(json.dumps(content))
