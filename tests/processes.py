"""Runs a function on several ranks, real processes that talk over Gloo, each under a time limit.

A server that has imported torch forks the ranks, so that starting them costs little::

    def job(rank, group, steps): ...   # at the top of a test file

    results = launch(4, job, 20)       # what each rank returned
    errors = failures(2, job, 20)      # what each rank raised, as text
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# What a first step would import, seconds a rank.
CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torch_hf"])
#: Seconds that Gloo waits for a rank, and that a test waits for all.
PATIENCE, LIMIT = 30, 120


def launch(ranks, job, *args, patience=PATIENCE, limit=LIMIT):
    """What ``job(rank, group, *args)`` returned on each rank; none may raise."""
    found = _run(ranks, job, args, patience, limit)
    errors = [f"rank {r}:\n{text}" for r, (_, text) in enumerate(found) if text]
    assert not errors, "\n".join(errors)
    return [value for value, _ in found]


def failures(ranks, job, *args, patience=PATIENCE, limit=LIMIT):
    """The traceback that ``job`` ended in on each rank, empty where it returned."""
    return [text for _, text in _run(ranks, job, args, patience, limit)]


def _run(ranks, job, args, patience, limit):
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_rank, args=(rank, ranks, store, patience, theirs, job, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        deadline = time.monotonic() + limit
        try:
            return [
                _received(rank, pipe, deadline - time.monotonic(), limit)
                for rank, pipe in enumerate(pipes)
            ]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _received(rank, pipe, seconds, limit):
    assert pipe.poll(max(seconds, 0)), f"rank {rank} was still running after {limit} s"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None, f"rank {rank} ended without a word"


def _rank(rank, ranks, store, patience, pipe, job, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=patience),
        )
        found = job(rank, dist.group.WORLD, *args), ""
    except BaseException:
        found = None, traceback.format_exc()
    finally:
        pipe.send_bytes(pickle.dumps(found))  # not send(): that would share the tensors' memory
        pipe.recv_bytes()  # until all have been heard: others may still need this rank
        os._exit(0)  # a broken group may hang in its destructor
