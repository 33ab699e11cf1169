"""Data-parallel training: every rank holds the layers, the batch's gradients are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_hf.distributed.reducer import Reducer, check_group
from torch_hf.kronecker._implicit import ImplicitWeights, layer_of
from torch_hf.kronecker._sparse_gradient import dense_rows


class Ranks:
    """Means of gradients over a process group; alone, it does nothing.

    Args:
        group: A ``torch.distributed`` process group, or None for one process.
        device: Where numbers travel.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        check_group(group)
        self._reducer = Reducer(group, device)

    def check_same_start(self, layers: Sequence[ImplicitWeights], others: Sequence[Tensor]) -> None:
        """Raises RuntimeError on all ranks where their parameters differ."""
        if self._reducer.group is None:
            return
        values = [layer.start.values for layer in layers] + [layer.products for layer in layers]
        values += [layer.fingerprint for layer in layers] + [p.detach() for p in others]
        sums = [float(x.double().sum()) for x in values if x is not None]
        table = self._reducer.table([float(len(sums)), *sums])
        first = torch.tensor(table[0], dtype=torch.float64)
        for rank, row in enumerate(table):
            if len(row) != len(first) or not torch.allclose(
                torch.tensor(row, dtype=torch.float64), first, rtol=1e-5, atol=1e-5
            ):
                raise RuntimeError(
                    "All ranks must start with the same weights and data, got different ones on "
                    f"ranks 0 and {rank}. Call torch.manual_seed with the same number on all ranks "
                    "before making the model, or load one state dict on all ranks."
                )

    def mean(self, params: Sequence[Tensor], found: dict[Tensor, Any]) -> dict[Tensor, Any]:
        """The mean gradient of each parameter that has one on some rank, in their order.

        Of a layer all ranks' rows, each by the number of ranks.
        """
        if self._reducer.group is None:
            return found
        rows = [float(len(found[p][0])) if _of_layer(p, found) else 0.0 for p in params]
        has = [float(p in found) for p in params]
        table = self._reducer.table(has + rows)
        result: dict[Tensor, Any] = {}
        for k, p in enumerate(params):
            if not any(row[k] for row in table):
                continue
            if layer_of(p) is not None:
                counts = [int(row[len(params) + k]) for row in table]
                result[p] = self._joined(p, found.get(p), counts)
            else:
                own = found.get(p)
                own = torch.zeros_like(p) if own is None else own
                own = own.to_dense() if own.is_sparse else own
                result[p] = self._reducer.small(own) / self._reducer.ranks
        return result

    def _joined(self, p: Tensor, own: Any, counts: list[int]) -> tuple[Tensor, Tensor]:
        """The samples and gradient rows of all ranks."""
        most, neurons, ranks = max(counts), p.shape[1], self._reducer.ranks
        samples = torch.zeros(most, dtype=torch.long, device=p.device)
        rows = p.new_zeros(most, neurons)
        if own is not None:
            count = len(own[0])
            samples[:count] = own[0]
            rows[:count] = dense_rows(own[1], count, neurons)
        all_samples = self._reducer.gather(samples, ranks * most).view(ranks, most)
        all_rows = self._reducer.gather(rows.view(-1), ranks * most * neurons)
        all_rows = all_rows.view(ranks, most, neurons) / ranks
        kept = [slice(count) for count in counts]
        return (
            torch.cat([all_samples[rank, part] for rank, part in enumerate(kept)]),
            torch.cat([all_rows[rank, part] for rank, part in enumerate(kept)]),
        )


def _of_layer(p: Tensor, found: dict[Tensor, Any]) -> bool:
    return p in found and layer_of(p) is not None
