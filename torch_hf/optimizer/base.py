"""What an optimizer of flat vectors keeps between steps, and keeps if a step fails."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_hf import _checks
from torch_hf.diagnostics.diagnose import explain
from torch_hf.distributed import PeerError, Reducer, Sharded, Space, parameter_vector, space_of
from torch_hf.objective import checks
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.optimizer.progress import Progress
from torch_hf.optimizer.state_dict import (
    MOST_NORMS,
    check_state,
    pack,
    saved_progress,
    unpack,
    upgraded,
    whole_state,
)
from torch_hf.preconditioner.protocol import Preconditioner
from torch_hf.report import Requests, StepReport
from torch_hf.vector import ParameterVector


class FlatStateOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose state is a few vectors over all parameters.

    ``self.state`` holds each parameter's pieces of them, so that checkpoints of any kind know whose
    they are. ``self.param_groups`` holds options alone, lambda among them.
    """

    preconditioner: Preconditioner
    curvature: str
    process_group: Any
    shard_state: bool
    last_report: StepReport | None
    _requests: Requests
    _start: Tensor | None  # where CG ended
    _norms: Tensor | None  # squared norms of the Jacobian's columns
    _format: tuple[torch.dtype, torch.device] | None = None  # of the vectors kept
    _progress: Progress

    def _trainable(self) -> list[Tensor]:
        return [p for _, p in self._owned()]

    def _owned(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Trainable parameters, each with its group."""
        return [(g, p) for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _vector(self) -> ParameterVector:
        vector = parameter_vector(self._trainable())
        if vector.sums:
            _checks.shard_state(True, vector, self.preconditioner)
        return vector

    def _space(self, vector: ParameterVector) -> tuple[Reducer, Space]:
        """Who adds up over ranks, and where the vectors of this step live."""
        group = getattr(vector, "group", self.process_group)
        reducer = Reducer(group, vector.device, inside=vector.sums)
        space = space_of(reducer, vector, self.shard_state)
        if hasattr(self.preconditioner, "space"):
            self.preconditioner.space = space
        return reducer, space

    # --- a step's beginning, and its end if it fails ---

    @contextmanager
    def _attempt(
        self,
        closure: Callable[..., Any],
        batches: Iterable[Any] | None,
        curvature_batches: Iterable[Any] | None,
        vector: ParameterVector,
    ) -> Iterator[Objective]:
        """The step's objective; an error inside leaves everything as it was before."""
        replay = Replay(vector.device, vector.params)
        gradients = [p.grad for p in vector.params]
        objective = forgotten = None
        form = self._format
        try:
            forgotten = self._forget_if_stale(vector) or self._convert(vector)
            objective = self._objective(closure, batches, curvature_batches, vector, replay)
            yield objective
        except BaseException as error:
            self.preconditioner.abandon()
            self._format = form
            if forgotten is not None:
                self._start, self._norms, pairs = forgotten
                self.preconditioner.load_state_dict(pairs)
            replay.undo()
            for p, g in zip(vector.params, gradients, strict=True):
                p.grad = g
            if not isinstance(error, PeerError) and (message := explain(error, objective)):
                raise RuntimeError(message) from error
            raise

    def _objective(
        self, closure: Any, batches: Any, curvature_batches: Any, vector: Any, replay: Replay
    ) -> Objective:
        checks.closure(closure)
        checks.accumulates(batches)
        for group in self.param_groups:
            _checks.options(group)
        reducer, space = self._space(vector)
        vector.modules = replay.buffers.seen
        return Objective(
            closure,
            vector,
            replay,
            batches=batches,
            curvature_batches=curvature_batches,
            decay=[g["weight_decay"] for g, _ in self._owned()],
            maximize=self.param_groups[0]["maximize"],
            layers=self.preconditioner.wants_layers,
            fast_convolutions=self.curvature == "ggn",
            reducer=reducer,
            space=space,
        )

    def _forget_if_stale(
        self, vector: ParameterVector
    ) -> tuple[Tensor | None, Tensor | None, Any] | None:
        """Drops directions of another length: parameters were added, frozen or thawed.

        Returns:
            What was dropped, for a step that fails.
        """
        known = list(self.state)
        if not known or [id(p) for p in known] == [id(p) for p in vector.params]:
            return None
        dropped = self._start, self._norms, self.preconditioner.state_dict()
        self._start = self._norms = None
        self.preconditioner.load_state_dict({})
        return dropped

    def _convert(self, vector: ParameterVector) -> tuple[Tensor | None, Tensor | None, Any] | None:
        """Takes what is kept along where the model went: ``model.double()``, ``.to(device)``.

        Returns:
            What it was before, for a step that fails; None where nothing has changed.
        """
        before, self._format = self._format, (vector.dtype, vector.device)
        if before is None or before == self._format:
            return None

        def converted(value: Any) -> Any:
            if not isinstance(value, Tensor) or (value.dtype, value.device) != before:
                return value
            return value.to(vector.device, vector.dtype)

        kept = self._start, self._norms, self.preconditioner.state_dict()
        self._start, self._norms = converted(kept[0]), converted(kept[1])
        self.preconditioner.load_state_dict({k: converted(v) for k, v in kept[2].items()})
        return kept

    # --- checkpoints ---

    def _initialise(self) -> None:
        """``step()`` without a closure: what distributed checkpointing does to make state."""
        params = self._trainable()
        checks.no_closure(params, [g["lr"] for g in self.param_groups])
        vector = self._vector()
        self._pack(vector, self._space(vector)[1])

    def _pack(self, vector: ParameterVector, space: Space) -> None:
        pack(self.state, vector, self._kept(vector), self.preconditioner, self._progress, space)

    def _kept(self, vector: ParameterVector) -> dict[str, Tensor | None]:
        alone = self.process_group is None and not vector.sums  # ranks take no exact steps
        small = alone and vector.numel <= MOST_NORMS
        return {"cg_iterate": self._start} | ({"column_norms": self._norms} if small else {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; a group may have its own ``lr`` and ``weight_decay``.

        The dictionary is copied, so that it can serve another optimizer, too.
        """
        _checks.group(param_group, self.defaults)
        if isinstance(param_group.get("params"), Iterator):
            param_group["params"] = list(param_group["params"])  # it can be read but once
        super().add_param_group(dict(param_group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state that ``state_dict`` gave, vectors in the precision they were saved in.

        A state of an older version loads; an option that it did not have is this optimizer's.

        Raises:
            ValueError: An entry does not fit these parameters or options; the message says which.
        """
        state_dict = upgraded(state_dict, self.defaults)
        check_state(state_dict, self.param_groups, self.defaults)
        vector = self._vector()
        _, space = self._space(vector)
        whole = state_dict | {"state": {}} if space.sharded else state_dict
        super().load_state_dict(whole)  # of what is sharded no rank is to hold all
        kept = unpack(state_dict, self.param_groups, vector, self.preconditioner, space)
        self._start, self._norms = kept.get("cg_iterate"), kept.get("column_norms")
        self._format = vector.dtype, vector.device
        self._progress = saved_progress(state_dict)
        self._pack(vector, space)

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``, vectors by parameter.

        With ``shard_state`` every rank must call it: the parts are gathered, into host memory, so
        that the state fits any number of ranks.
        """
        vector = self._vector()
        _, space = self._space(vector)
        if not isinstance(space, Sharded) or not self.state:
            return super().state_dict()
        kept = self.state
        try:
            self.state = defaultdict(dict)
            self.state |= whole_state(
                vector, self._kept(vector), self.preconditioner, self._progress, space
            )
            return super().state_dict()
        finally:
            self.state = kept

    def __getstate__(self) -> dict[str, Any]:
        own = ["preconditioner", "curvature", "process_group", "shard_state"]
        own += ["last_report", "_requests", "_start", "_norms", "_format", "_progress"]
        return super().__getstate__() | {name: getattr(self, name) for name in own}
