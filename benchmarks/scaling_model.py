"""The model behind benchmarks/scaling.py: what a step on N ranks computes, sends, and takes.

Every formula is of numbers that are counted (collectives of a step, see
tests/integration/test_scaling.py), measured here (Gloo on this machine), or given on the command
line (GPUs and their links).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

KINDS = REDUCE, SCATTER, GATHER = "all-reduce", "reduce-scatter", "all-gather"
MODES = REPLICATED, SHARDED, FULLY = "data parallel", "shard_state", "fully_shard"
FLOAT = 4
#: A product through the kept graph, in gradients (benchmarks/products.py, linear layers).
PRODUCT = 1.37
#: A gradient is a forward and a backward of twice its work.
EVALUATION = 1 / 3
#: Passes over P numbers in an iteration of CG, beside the 4 M of L-BFGS' two products.
PASSES = 12


# --- a collective: alpha for each hop, beta for each byte ---


@dataclass(frozen=True)
class Link:
    """Seconds a hop, and seconds a byte."""

    alpha: float
    beta: float


def ring(kind: str, ranks: int) -> tuple[float, float]:
    """Hops of a ring algorithm, and how many times its bytes pass a rank's link."""
    rounds = 2 if kind == REDUCE else 1
    return rounds * (ranks - 1), rounds * (ranks - 1) / ranks


def ring_seconds(link: Link, kind: str, size: float, ranks: int) -> float:
    hops, times = ring(kind, ranks)
    return hops * link.alpha + times * size * link.beta


def fit(kind: str, ranks: int, samples: Sequence[tuple[int, float]]) -> Link:
    """The least squares of relative errors over (bytes, seconds); neither number is negative."""
    hops, times = ring(kind, ranks)
    taken = torch.tensor([t for _, t in samples], dtype=torch.float64)
    rows = torch.tensor([[hops, times * n] for n, _ in samples], dtype=torch.float64)
    rows /= taken[:, None]
    scale = rows.norm(dim=0)
    ones = torch.ones(len(samples), 1, dtype=torch.float64)
    alpha, beta = (torch.linalg.lstsq(rows / scale, ones).solution[:, 0] / scale).tolist()
    if alpha < 0:
        alpha, beta = 0.0, float(rows[:, 1].sum() / rows[:, 1].square().sum())
    if beta < 0:
        alpha, beta = float(rows[:, 0].sum() / rows[:, 0].square().sum()), 0.0
    return Link(alpha, beta)


# --- a step: what is computed and what is sent ---


@dataclass(frozen=True)
class Work:
    """How often a step does what; a typical one of the examples by default."""

    iterations: int = 30
    evaluations: int = 5
    pairs: int = 20

    @property
    def products(self) -> int:
        return self.iterations + 1  # CG's start costs one

    @property
    def kept(self) -> int:
        """CG's iterates that are kept: at ceil(1.3^j), and the last."""
        most = math.ceil(math.log(self.iterations) / math.log(1.3)) + 1
        return len({min(math.ceil(1.3**j), self.iterations) for j in range(most)})


def collectives(mode: str, work: Work) -> dict[str, int]:
    """How many collectives of P, and of a few numbers (``small``), a step makes.

    Of ``fully_shard``, whose module communicates by itself: a run gathers the module, a backward
    gathers and scatters it; a product is two runs and a backward.
    """
    # two sums an iteration and one of the preconditioner, which the last (of the most) leaves out
    few = 3 * work.iterations - 2 + work.evaluations
    if mode == REPLICATED:
        return {REDUCE: 1 + work.products, SCATTER: 0, GATHER: 0, "small": few + 10}
    if mode == SHARDED:  # a direction is gathered when it is tried and taken, and .grad is
        gathers = work.products + work.evaluations + 2
        return {REDUCE: 0, SCATTER: 1 + work.products, GATHER: gathers, "small": few + 11}
    gathers = 2 + 3 * work.products + work.evaluations
    return {REDUCE: 0, SCATTER: 1 + work.products, GATHER: gathers, "small": few + 11}


def memory(mode: str, numel: float, ranks: int, work: Work) -> float:
    """Bytes a rank, parameters and their gradient with them, without the batch's graph."""
    vectors = 4 * work.pairs + work.kept
    if mode == REPLICATED:
        return FLOAT * numel * (vectors + 9 + 2)
    whole = 3 + 2 if mode == SHARDED else 0
    own = vectors + 6 + (0 if mode == SHARDED else 5)
    return FLOAT * numel * (own / ranks + whole)


# --- GPUs ---


@dataclass(frozen=True)
class Hardware:
    """A cluster; the defaults are published or assumed, none is measured here.

    Published for H100 SXM: ``flops`` (TF32, dense), ``bandwidth`` (bytes/s of its memory),
    ``inside`` (NVLink 4, bytes/s in one direction), ``between`` (an NDR 400 Gb/s adapter a GPU),
    ``memory``. Assumed: the shares of those that are reached, and latencies.
    """

    flops: float = 495e12
    utilisation: float = 0.4
    bandwidth: float = 3.35e12
    inside: float = 450e9
    between: float = 50e9
    reached: float = 0.8
    alpha_inside: float = 3e-6
    alpha_between: float = 10e-6
    node: int = 8
    memory: float = 80e9

    def collective(self, kind: str, size: float, ranks: int) -> float:
        """Scattered within nodes, then between them (each GPU its part), then gathered.

        Hops between nodes are those of a tree, 2 log2 of their number for an all-reduce.
        """
        if ranks == 1:
            return 0.0
        local, nodes = min(ranks, self.node), max(ranks // self.node, 1)
        rounds = 2 if kind == REDUCE else 1
        inside = Link(self.alpha_inside, 1 / (self.inside * self.reached))
        seconds = ring_seconds(inside, kind, size, local)
        if nodes > 1:
            share = rounds * (nodes - 1) / nodes * size / local
            hops = rounds * math.ceil(math.log2(nodes))
            seconds += hops * self.alpha_between + share / (self.between * self.reached)
        return seconds

    def parts(
        self, mode: str, numel: float, batch: float, ranks: int, work: Work
    ) -> dict[str, float]:
        """Seconds of a step of ``batch`` cases (of tokens, for a transformer) on all ranks."""
        gradient = 6 * numel * batch / ranks / (self.flops * self.utilisation)
        product = PRODUCT if mode != FULLY else 2 * EVALUATION + 2 / 3
        gradients = 1 + work.products * product + work.evaluations * EVALUATION
        passes = work.iterations * (4 * work.pairs + PASSES)
        own = numel if mode == REPLICATED else numel / ranks
        sent = collectives(mode, work)
        large = sum(sent[kind] * self.collective(kind, FLOAT * numel, ranks) for kind in KINDS)
        return {
            "compute": gradients * gradient,
            "vectors": passes * FLOAT * own / (self.bandwidth * self.reached),
            "large": large,
            "small": sent["small"] * self.collective(REDUCE, 64, ranks),
        }

    def efficiency(self, mode: str, numel: float, batch: float, ranks: int, work: Work) -> float:
        """Speed over that of one GPU (were its memory large enough), a GPU."""
        alone = sum(self.parts(REPLICATED, numel, batch, 1, work).values())
        return alone / (ranks * sum(self.parts(mode, numel, batch, ranks, work).values()))

    def turning_batch(self, mode: str, numel: float, ranks: int, work: Work) -> float:
        """Cases a GPU below which a step communicates for longer than it differentiates."""
        parts = self.parts(mode, numel, ranks, ranks, work)  # one case each
        return (parts["large"] + parts["small"]) / parts["compute"]

    def turning_ranks(self, mode: str, numel: float, batch: float, work: Work) -> int:
        """The first power of 2 at which that is so, for a batch; 0 if at none up to 2^14."""
        for ranks in (2**k for k in range(1, 15)):
            if batch / ranks < self.turning_batch(mode, numel, ranks, work):
                return ranks
        return 0
