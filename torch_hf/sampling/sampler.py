"""Batches that grow while a model learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch.utils.data

from torch_hf import _checks
from torch_hf.report import StepReport
from torch_hf.sampling.growth import GeometricGrowth, Growth
from torch_hf.sampling.neglect import DRAWN_AHEAD, Neglect, refuse_as_sampler
from torch_hf.sampling.state import check_state


class GrowingBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Yields lists of indices, every case once an epoch, in batches that grow.

    Pass it to a ``DataLoader`` as ``batch_sampler`` and call :meth:`set_epoch` before each
    epoch: epoch ``k`` has batches of ``growth**k * batch_size`` cases (arXiv 1309.1508). Sizes
    are global: of ``num_replicas`` processes, rank ``i % num_replicas`` gets case ``i`` of each
    batch, so all yield equally many. A tail of fewer cases than ranks joins the batch before.

    After :meth:`load_state_dict` the next iteration yields the batches of the saved epoch that
    were not consumed (maybe none); ``set_epoch`` with that epoch changes nothing, any other
    starts whole. Drawing a batch consumes it, until :meth:`update` is first called: then each
    call consumes one. ``DataLoader`` workers draw several batches ahead: with ``num_workers > 0``
    call ``update`` for every batch, or save a ``StatefulDataLoader``, which counts by itself
    (its snapshots precede the last reports, so not with a rule that measures).

    Args:
        data_source: Number of cases, or a dataset with a length.
        batch_size: Cases in the first batches.
        growth: Factor of :class:`GeometricGrowth`, or a :class:`Growth`.
        max_batch_size: Where growth ends, all cases if None. A joined tail comes on top.
        curvature_batch_size: Cases of the first curvature samples; None is the whole batch.
        curvature_growth: Factor of the curvature sample, at least 1; None keeps its part of the
            batch.
        grow_every: ``"epoch"``, or ``"step"``: with each batch consumed, over all epochs.
        shuffle: Draw the order from ``seed + epoch``, as ``DistributedSampler`` does.
        drop_last: Leave out a last batch that is not full.
        seed: The same on all ranks.
        num_replicas: Processes that share each batch; None is one.
        rank: Which of them this is, from 0.

    Raises:
        TypeError, ValueError: If an argument is wrong; the message names it.

    Example:
        >>> sampler = GrowingBatchSampler(10, batch_size=2, growth=2, shuffle=False)
        >>> sampler.set_epoch(1)
        >>> list(sampler), len(sampler)
        ([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], 3)
    """

    def __init__(
        self,
        data_source: int | Sized,
        batch_size: int,
        growth: float | Growth = 1.2,
        *,
        max_batch_size: int | None = None,
        curvature_batch_size: int | None = None,
        curvature_growth: float | None = 1.3,
        grow_every: str = "epoch",
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if (num_replicas is None) != (rank is None):
            raise ValueError(
                f"num_replicas and rank must be given together, got {num_replicas=}, {rank=}. Pass "
                "both or neither."
            )
        if grow_every not in ("epoch", "step"):
            raise ValueError(f"grow_every must be 'epoch' or 'step', got {grow_every!r}.")
        cases = len(data_source) if isinstance(data_source, Sized) else data_source
        by_step, ranks = grow_every == "step", 1 if num_replicas is None else num_replicas
        cap = cases if max_batch_size is None else max_batch_size
        curvature = batch_size if curvature_batch_size is None else curvature_batch_size
        _checks.between("data_source (its length, or itself)", cases, 1)
        _checks.between("num_replicas", ranks, 1)
        _checks.between("rank", rank or 0, 0, ranks - 1, "num_replicas - 1")
        _checks.between(
            "batch_size", batch_size, ranks, cases, "num_replicas to the number of cases"
        )
        _checks.between("max_batch_size", cap, batch_size, hint="batch_size")
        _checks.between(
            "curvature_batch_size", curvature, ranks, batch_size, "num_replicas to batch_size"
        )
        if curvature_growth is not None:
            _checks.between("curvature_growth", curvature_growth, 1.0)
        _checks.between("seed", seed, -(2**63))
        self.growth = growth if isinstance(growth, Growth) else GeometricGrowth(growth)
        own = None if curvature_growth is None else GeometricGrowth(curvature_growth)
        self.curvature_growth = own
        self.cases, self.seed, self.num_replicas, self.rank = cases, seed, ranks, rank or 0
        self.first_batch_size, self.max_batch_size = batch_size, min(cap, cases)
        self._first_curvature = cases if curvature_batch_size is None else curvature
        self.shuffle, self.drop_last, self.by_step = bool(shuffle), bool(drop_last), by_step
        self.measured = self.measured_before = float(batch_size)  # so far; before this epoch
        self.counts_updates, self._asked_epoch, self._walk = False, 0, _Walk(self)
        reads = type(self.growth).measured is not Growth.measured
        self._neglect = Neglect(self._grows_by_epoch(), type(self.growth).__name__ * reads)

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._walk.epoch

    @property
    def sampler(self) -> GrowingBatchSampler:
        """Itself: where Lightning looks for the ``set_epoch`` to call."""
        return self

    @property
    def batch_size(self) -> int:
        """Cases in the current batch, over all ranks (the last of an epoch may differ)."""
        return self._size(self._clock())

    @property
    def curvature_batch_size(self) -> int:
        """This rank's cases of the curvature sample: ``head(batch, curvature_batch_size)``."""
        if self.curvature_growth is None:
            grown = self._first_curvature / self.first_batch_size * self.batch_size
        else:
            grown = self.curvature_growth.scheduled(self._first_curvature, self._clock())
        return len(range(self.rank, round(min(grown, self.batch_size)), self.num_replicas))

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the current one, to be walked from its start unless it is already."""
        _checks.between("epoch", epoch, 0)
        self._asked_epoch = epoch
        if epoch != self.epoch:
            self._leave_epoch()
            self._walk, self.measured_before = self._walk.following(epoch), self.measured
        self._neglect.set_epoch.hear()

    def update(self, report: StepReport) -> None:
        """Take note of one step: a batch is consumed, and the growth rule reads the report."""
        if not isinstance(report, StepReport):
            raise TypeError(
                f"report must be a StepReport, got {report!r}. Call "
                "sampler.update(optimizer.last_report) after a step."
            )
        self._neglect.update.hear()
        wanted = float(min(self.growth.measured(report, self.measured), self.max_batch_size))
        self.measured = max(self.measured, wanted)
        before = self._walk.consumed if self.counts_updates else 0
        self._walk.consumed, self.counts_updates = min(before + 1, len(self._walk.ends)), True

    def __len__(self) -> int:
        """Batches of the running iteration, else of the next (if sizes stay as measured)."""
        refuse_as_sampler(self)
        return self._length()

    def _length(self) -> int:
        walk = self._walk.following(self.epoch) if self._walk.done else self._walk
        rest = walk.rest(len(walk.ends))
        if not self.by_step:
            full, tail = divmod(self.cases - rest.position, self._size(walk.epoch))
            return len(walk.ends) + full + (tail >= self.num_replicas and not self.drop_last)
        return len(walk.ends) + sum(1 for _ in iter(rest.draw, None))

    def __iter__(self) -> Iterator[list[int]]:
        refuse_as_sampler(self)
        # A DataLoader opens iterators that it never draws from: they must not lose the place.
        begun = (self._walk.ends or self._walk.done) and not self._walk.primed
        if begun:
            self._leave_epoch()
        self._walk = self._walk.following(self.epoch) if begun else self._walk.rest(0)
        return self._walk

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and one list of ints, ``ahead``; they serve any number of ranks."""
        return self._state(self._walk.rest(self._walk.consumed))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where the saved sampler stood.

        Raises:
            TypeError, ValueError: An entry is wrong, missing or unknown; the message names it, and
                nothing has changed.
        """
        check_state(state, self._state(self._walk), _FIXED, self.cases)
        walk = _Walk(self, *(state[name] for name in _PLACE))
        walk.ahead = list(walk.ahead)
        measured = {name: type(getattr(self, name))(state[name]) for name in _MEASURED}
        vars(self).update(measured, _walk=walk)
        self._neglect.update.heard |= self.counts_updates

    def _state(self, walk: _Walk) -> dict[str, Any]:
        mine = {name: getattr(self, name) for name in (*_FIXED, *_MEASURED)}
        return mine | {name: getattr(walk, name) for name in _PLACE}

    def _grows_by_epoch(self) -> bool:
        reads = type(self.growth).measured is not Growth.measured
        first, own = self.first_batch_size, self.curvature_growth
        batch = reads or self.growth.scheduled(first, 1) > first
        curvature = own is not None and own.factor > 1 and self._first_curvature < first
        return not self.by_step and ((batch and self.max_batch_size > first) or curvature)

    def _leave_epoch(self) -> None:
        walk = self._walk
        most = len(walk.ends) > DRAWN_AHEAD and 2 * walk.ends[-1] >= self.cases
        if walk.trains and walk.ends and (walk.done or most):
            self._neglect.walked()

    def _clock(self) -> int:
        last_is_current = bool(self._walk.ends) and not self.counts_updates
        return self._walk.clock(self._walk.consumed - last_is_current)

    def _size(self, clock: int) -> int:
        scheduled = self.growth.scheduled(self.first_batch_size, clock)
        measured = self.measured if self.by_step else self.measured_before
        return round(min(max(scheduled, measured), self.max_batch_size))


# What a state holds: what must be equal, what was measured, where the walk stands.
_FIXED = "cases", "first_batch_size", "by_step", "shuffle", "drop_last", "seed"
_MEASURED = "measured", "measured_before", "counts_updates"
_PLACE = "epoch", "steps", "batches", "position", "ahead"


@dataclass(eq=False)
class _Walk(Iterator[list[int]]):
    """One iteration over an epoch, or over what is left of it."""

    sampler: GrowingBatchSampler
    epoch: int = 0
    steps: int = 0  # consumed before the epoch's first batch
    batches: int = 0  # of the epoch, consumed before this walk
    position: int = 0  # cases in those
    ahead: list[int] = field(default_factory=list)  # sizes that its first batches must have
    ends: list[int] = field(default_factory=list)  # of the batches drawn, in cases
    consumed: int = 0
    done: bool = False
    primed: bool = False  # drawn from by a loader that may start it anew
    trains: bool = False  # drawn from where gradients are recorded
    order: torch.Tensor | None = None

    def clock(self, number: int) -> int:
        """How often batches have grown when this walk's batch ``number``, from 0, is drawn."""
        return self.steps + self.batches + number if self.sampler.by_step else self.epoch

    def draw(self) -> slice | None:
        """This rank's places in the order of the next batch, None where the epoch ends."""
        sampler, ranks, drawn = self.sampler, self.sampler.num_replicas, len(self.ends)
        size = self.ahead[drawn] if drawn < len(self.ahead) else sampler._size(self.clock(drawn))
        start = self.ends[-1] if self.ends else self.position
        left = sampler.cases - start
        self.done = left < ranks or (sampler.drop_last and left < size)
        if self.done:
            return None
        joined = left - size < ranks and not sampler.drop_last
        self.ends.append(sampler.cases if joined else start + size)
        self.consumed += not sampler.counts_updates
        return slice(start + sampler.rank, self.ends[-1], ranks)

    def __next__(self) -> list[int]:
        share, n = None, self.sampler.cases
        if not self.done:
            self.trains |= self.sampler._neglect.draws(first=not self.ends)
            share = self.draw()
        if share is None:
            raise StopIteration
        if self.order is None:
            random = torch.Generator().manual_seed(self.sampler.seed + self.epoch)
            order = torch.randperm(n, generator=random, device="cpu")
            self.order = order if self.sampler.shuffle else torch.arange(n, device="cpu")
        return cast("list[int]", self.order[share].tolist())

    def rest(self, consumed: int) -> _Walk:
        """What is left of the epoch after so many batches of this walk."""
        start, *ends = [self.position, *self.ends][consumed:]
        sizes = [b - a for a, b in pairwise((start, *ends))]
        ahead = sizes + self.ahead[len(self.ends) :] if self.sampler.by_step else []
        return _Walk(self.sampler, self.epoch, self.steps, self.batches + consumed, start, ahead)

    def following(self, epoch: int) -> _Walk:
        """The walk over a whole epoch that comes after this one."""
        return _Walk(self.sampler, epoch, self.steps + self.batches + self.consumed)

    def state_dict(self) -> dict[str, Any]:
        """Asked by ``StatefulDataLoader``, of which each batch drawn is one consumed."""
        return self.sampler._state(self.rest(len(self.ends)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Called by ``StatefulDataLoader``; the sampler stands there too."""
        (sampler := self.sampler).load_state_dict(state)
        if not sampler._length():  # StatefulDataLoader loads late: it would undo a set_epoch
            sampler._walk.done = True
            sampler.set_epoch(max(sampler.epoch, sampler._asked_epoch))
            sampler._walk.primed = not sampler._walk.done
        vars(self).update(vars(sampler._walk))
        sampler._walk = self
