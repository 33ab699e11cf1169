"""Hessian-free optimization that swaps into an existing PyTorch training loop."""

from torch_hf._version import __version__
from torch_hf.checkpoint import save_atomically
from torch_hf.diagnostics.diagnose import Diagnosis, diagnose
from torch_hf.distributed import PeerError, check_replicas
from torch_hf.optimizer.hf import HFOptimizer
from torch_hf.optimizer.sharded_checkpoint import load_sharded, save_sharded
from torch_hf.preconditioner import LBFGSPreconditioner
from torch_hf.report import StepReport, Stop
from torch_hf.sampling.batches import head, split_batch
from torch_hf.sampling.growth import GeometricGrowth, RatioGrowth, VarianceGrowth
from torch_hf.sampling.sampler import GrowingBatchSampler

__all__ = [
    "Diagnosis",
    "GeometricGrowth",
    "GrowingBatchSampler",
    "HFOptimizer",
    "LBFGSPreconditioner",
    "PeerError",
    "RatioGrowth",
    "StepReport",
    "Stop",
    "VarianceGrowth",
    "__version__",
    "check_replicas",
    "diagnose",
    "head",
    "load_sharded",
    "save_atomically",
    "save_sharded",
    "split_batch",
]
