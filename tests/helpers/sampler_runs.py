"""What batches of a growing sampler should be, and the samplers of all ranks."""

import io
import itertools

import torch

from torch_hf.report import StepReport, Stop
from torch_hf.sampling.sampler import GrowingBatchSampler


def report(variance=None, norm=1.0, cases=8):
    numbers = (1, 2.0, 1.0, True, 0.9, 1e-2, norm, 1.0, 12, Stop.PROGRESS, 13, 2, cases, cases)
    return StepReport(*numbers, "double_backward", gradient_variance=variance)


def order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def joined(batches):
    return list(itertools.chain.from_iterable(batches))


def on_all_ranks(n, batch_size, ranks, **options):
    return [
        GrowingBatchSampler(n, batch_size, num_replicas=ranks, rank=rank, **options)
        for rank in range(ranks)
    ]


def interleaved(shares):
    """The global batch from the ranks' shares; they differ by one case, the first are larger."""
    rows = itertools.zip_longest(*shares)
    return [index for row in rows for index in row if index is not None]


def saved(state):
    """The state as a checkpoint gives it back; it holds nothing but numbers and a list."""
    for value in state.values():
        assert type(value) in (int, float, bool) or all(type(item) is int for item in value)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
