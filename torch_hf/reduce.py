"""The old name of :mod:`torch_hf.distributed`; deprecated."""

from torch_hf.distributed import *  # noqa: F403
