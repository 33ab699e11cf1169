"""What an optimizer of flat vectors keeps between steps, and keeps if a step fails."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_hf import _checks
from torch_hf.curvature.cuda_graph import Recorder
from torch_hf.distributed import Reducer, Sharded, Space, parameter_vector, space_of
from torch_hf.objective import checks
from torch_hf.objective.objective import Objective
from torch_hf.optimizer.broyden_step import Secant
from torch_hf.optimizer.progress import Progress
from torch_hf.optimizer.state_dict import (
    MOST_NORMS,
    SECANT,
    Unpacked,
    check_form,
    check_state,
    pack,
    unpack,
    upgraded,
    whole_state,
)
from torch_hf.optimizer.transaction import Transaction
from torch_hf.preconditioner.choose import factors_of
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
    _secant: Secant | None  # the inverse Hessian of quasi-Newton iterations
    _format: tuple[torch.dtype, torch.device] | None = None  # of the vectors kept
    _progress: Progress
    _knows_precision = False  # whether a step has looked at it
    _knows_preconditioner = False  # whether a solve has looked at one of the user's own
    _recorder: Recorder  # of products on a GPU
    _knows_rates = False  # whether the user was told that lr is small
    _left: Sequence[Any] = ()  # weak references to the gradients that the last step left

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

    # --- a step's beginning ---

    def _objective(
        self,
        closure: Any,
        batches: Any,
        curvature_batches: Any,
        vector: ParameterVector,
        change: Transaction,
    ) -> Objective:
        self._forget_if_stale(vector, change)
        self._convert(vector, change)
        checks.closure(closure)
        checks.accumulates(batches)
        for group in self.param_groups:
            _checks.options(group)
        reducer, space = self._space(vector)
        vector.modules = change.replay.buffers.seen
        change.objective = Objective(
            closure,
            vector,
            change.replay,
            batches=batches,
            curvature_batches=curvature_batches,
            decay=[float(g["weight_decay"]) for g, _ in self._owned()],
            maximize=self.param_groups[0]["maximize"],
            layers=self._wants_layers(),
            tangent_rules=self.curvature == "ggn",
            reducer=reducer,
            space=space,
        )
        return change.objective

    def _wants_layers(self) -> bool:
        """Whether a full step or a light one would look at layers."""
        factors = factors_of(self.preconditioner)
        return self.preconditioner.wants_layers or bool(factors and factors.wants_layers_light)

    def _forget_if_stale(self, vector: ParameterVector, change: Transaction) -> None:
        """Drops directions of another length: parameters were added, frozen or thawed."""
        known = list(self.state)
        if known and [id(p) for p in known] != [id(p) for p in vector.params]:
            change.reloads = True
            self._start = self._norms = self._secant = None
            self.preconditioner.load_state_dict({})

    def _convert(self, vector: ParameterVector, change: Transaction) -> None:
        """Takes what is kept along where the model went: ``model.double()``, ``.to(device)``."""
        before, self._format = self._format, (vector.dtype, vector.device)
        if before is None or before == self._format:
            return

        def converted(value: Any) -> Any:
            if not isinstance(value, Tensor) or (value.dtype, value.device) != before:
                return value
            return value.to(vector.device, vector.dtype)

        change.reloads = True
        self._start, self._norms = converted(self._start), converted(self._norms)
        if self._secant is not None:  # in a type of its own, to which the next step turns it
            moved = (None if t is None else t.to(vector.device) for t in self._secant)
            self._secant = Secant(*moved)  # type: ignore[arg-type]
        kept = self.preconditioner.state_dict()
        self.preconditioner.load_state_dict({k: converted(v) for k, v in kept.items()})

    # --- checkpoints ---

    def _initialise(self) -> None:
        """``step()`` without a closure: what distributed checkpointing does to make state."""
        params = self._trainable()
        checks.no_closure(params, [g["lr"] for g in self.param_groups])
        vector = self._vector()
        change = Transaction(self, vector)
        with change, change:
            self._pack(vector, self._space(vector)[1])
            change.whole = True

    def _pack(self, vector: ParameterVector, space: Space) -> None:
        pack(
            self.state,
            vector,
            self._kept(vector, space),
            self.preconditioner,
            self._progress,
            space,
        )

    def _kept(self, vector: ParameterVector, space: Space) -> dict[str, Tensor | None]:
        whole = not (vector.sums or space.sharded)  # else there are no exact steps
        small = whole and vector.numel <= MOST_NORMS
        kept = {"cg_iterate": self._start} | ({"column_norms": self._norms} if small else {})
        if self._secant is not None:
            kept |= {k: v for k, v in zip(SECANT, self._secant, strict=True) if v is not None}
        return kept

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
            ValueError: An entry does not fit these parameters or options; the message says which,
                and the optimizer is as it was.
        """
        check_form(state_dict)
        vector = self._vector()
        change = Transaction(self, vector)
        found: list[Unpacked] = []

        def check(_: Any, saved: Any) -> dict[str, Any]:
            check_form(saved)  # which hooks may have changed
            full = upgraded(saved, self.defaults)
            check_state(full, self.param_groups, self.defaults)
            space = self._space(vector)[1]
            groups = self.param_groups
            found.append(unpack(full, groups, vector, self.preconditioner, space))
            return full | {"state": {}}  # it would cast vectors to the parameters' types

        def take(_: Any) -> None:
            self._take(found[-1], vector)

        with change, change:
            change.reloads = True
            # The user's hooks run before the one and after the other, and see what they expect.
            hooks = change.replay.hooks.on(
                lambda: self.register_load_state_dict_pre_hook(check),
                lambda: self.register_load_state_dict_post_hook(take, prepend=True),
            )
            with hooks:
                super().load_state_dict(dict(state_dict))
            change.whole = True

    def _take(self, found: Unpacked, vector: ParameterVector) -> None:
        """Makes what was found in a state this optimizer's own."""
        try:
            self.preconditioner.load_state_dict(found.entries)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            name = type(self.preconditioner).__name__
            raise ValueError(
                f"The preconditioner {name} cannot load the state's entries "
                f"{sorted(found.entries)}: {error}. Load another checkpoint, or start with a new "
                "optimizer."
            ) from error
        self._start, self._norms, self._secant = found.start, found.norms, found.secant
        self._format = vector.dtype, vector.device
        self._progress = found.progress
        self._pack(vector, self._space(vector)[1])

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
                vector, self._kept(vector, space), self.preconditioner, self._progress, space
            )
            return super().state_dict()
        finally:
            self.state = kept

    def __getstate__(self) -> dict[str, Any]:
        own = ["preconditioner", "curvature", "process_group", "shard_state"]
        own += ["last_report", "_requests", "_start", "_norms", "_secant", "_format", "_progress"]
        own += ["_recorder", "_knows_precision", "_knows_preconditioner", "_knows_rates"]
        return super().__getstate__() | {name: getattr(self, name) for name in own}
