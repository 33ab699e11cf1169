"""Runs examples/distributed.py with a rank that is lost: torchrun ... faulty_rank.py ARGUMENTS.

In the first life of the job rank 1 kills itself or hangs (FAULT) in the midst of FAULTY_STEP,
as a machine that loses its power, or its network, does.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

#: In a collective of CG, so that the other ranks wait in it.
COLLECTIVES_INTO_STEP = 6


def arm(fault, step):
    from torch_hf import HFOptimizer

    take, all_reduce = HFOptimizer.step, dist.all_reduce
    seen = {"steps": 0, "collectives": 0}

    def counted_step(self, *args, **options):
        seen["steps"] = (next(iter(self.state.values())) if self.state else {"steps": 0})[
            "steps"
        ] + 1
        seen["collectives"] = 0
        return take(self, *args, **options)

    def faulty_all_reduce(*args, **options):
        seen["collectives"] += 1
        if seen["steps"] == step and seen["collectives"] == COLLECTIVES_INTO_STEP:
            print(f"rank {os.environ['RANK']}: {fault} in step {step}", flush=True)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return all_reduce(*args, **options)

    HFOptimizer.step, dist.all_reduce = counted_step, faulty_all_reduce


if __name__ == "__main__":
    example = Path(__file__).parents[2] / "examples" / "distributed.py"
    sys.argv[0] = str(example)
    sys.path[0] = str(example.parent)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        arm(os.environ["FAULT"], int(os.environ["FAULTY_STEP"]))
    runpy.run_path(str(example), run_name="__main__")
