"""What ranks do together; the only package that imports ``torch.distributed``."""

from torch_hf.distributed.fully_sharded import (
    FullyShardedVector,
    is_fully_sharded,
    parameter_vector,
)
from torch_hf.distributed.lead import lead
from torch_hf.distributed.reducer import PeerError, Reducer, check_group, unreduced
from torch_hf.distributed.replicas import check_replicas
from torch_hf.distributed.vector_space import LOCAL, Own, Replicated, Sharded, Space, space_of

__all__ = [
    "LOCAL",
    "FullyShardedVector",
    "Own",
    "PeerError",
    "Reducer",
    "Replicated",
    "Sharded",
    "Space",
    "check_group",
    "check_replicas",
    "is_fully_sharded",
    "lead",
    "parameter_vector",
    "space_of",
    "unreduced",
]
