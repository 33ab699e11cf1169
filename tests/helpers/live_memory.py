"""Counts the memory of tensors that are alive, by the storages that operations make."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Bytes in storages made inside that are still alive, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor):
                self._note(t.untyped_storage(), inputs)
        return found

    def _note(self, storage, inputs):
        key = storage._cdata
        if key in self.known or key in inputs:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size
