"""What the optimizer keeps between steps as per-parameter state, and back.

``torch.optim`` and its checkpoints know state by parameter. Here each parameter's piece is a
view of the flat vector, so that keeping it costs nothing. Numbers lie with the first parameter, as
those of ``torch.optim.LBFGS`` do, and are Python's: tensors would be cast to the parameter's type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from torch_hf import _checks
from torch_hf.distributed import LOCAL, Sharded, Space
from torch_hf.optimizer.broyden_step import Secant
from torch_hf.optimizer.progress import Progress
from torch_hf.preconditioner.protocol import Preconditioner
from torch_hf.preconditioner.saved_state import floats, is_dense, refused
from torch_hf.solver.limited_memory import pairs_that_fit
from torch_hf.vector import ParameterVector

_PREFIX = "preconditioner."
#: What the optimizer itself keeps of length P: where CG ended, and squared norms of the Jacobian's
#: columns (of up to ``MOST_NORMS`` parameters).
VECTORS = ("cg_iterate", "column_norms")
MOST_NORMS = 2**20
#: What quasi-Newton iterations keep of length P, several rows each; only where there were any.
SECANT = ("broyden_inverse", "lbfgs_pairs", "broyden_anchor")
Vectors = Mapping[str, Tensor | None]
#: What every version wrote into each group; options that came later take their defaults.
_ALWAYS_WRITTEN = (
    "lr",
    "weight_decay",
    "damping",
    "cg_max_iter",
    "cg_tol",
    "cg_decay",
    "maximize",
    "curvature",
    "preconditioner",
    "history_size",
)


def pack(
    state: Any,
    vector: ParameterVector,
    vectors: Vectors,
    preconditioner: Preconditioner,
    progress: Progress,
    space: Space = LOCAL,
) -> None:
    """Lays the optimizer's vectors and the preconditioner's out by parameter.

    Parameters that are not in ``vector`` (frozen since) lose theirs: it would be another step's.
    Vectors of which this rank holds a part are left where they are, for :func:`whole_state`.
    """
    state.clear()
    for p in vector.params:
        state[p] = {}
    state[vector.params[0]].update(progress._asdict())
    if isinstance(space, Sharded):
        return
    flats = {k: vector.zeros() if v is None else v for k, v in vectors.items()}
    _lay_out(state, vector, flats | _prefixed(preconditioner), vector.numel)


def whole_state(
    vector: ParameterVector,
    vectors: Vectors,
    preconditioner: Preconditioner,
    progress: Progress,
    space: Sharded,
) -> dict[Tensor, dict[str, Any]]:
    """What :func:`pack` would have laid out, gathered from all ranks into host memory.

    Every rank must call this: it is one all-gather for each vector.
    """
    flats: dict[str, Any] = {}
    for key, value in vectors.items():
        flats[key] = (vector.zeros() if value is None else space.whole(value)).cpu()
    for key, value in _prefixed(preconditioner).items():
        flats[key] = value
        if _is_vector(value, space.length):
            rows = [space.whole(row).cpu() for row in value.reshape(-1, space.length)]
            flats[key] = torch.stack(rows).view(*value.shape[:-1], vector.numel)
    state: dict[Tensor, dict[str, Any]] = {p: {} for p in vector.params}
    state[vector.params[0]].update(progress._asdict())
    _lay_out(state, vector, flats, vector.numel)
    return state


def _prefixed(preconditioner: Preconditioner) -> dict[str, Any]:
    return {_PREFIX + k: v for k, v in preconditioner.state_dict().items()}


def _lay_out(state: Any, vector: ParameterVector, flats: Mapping[str, Any], numel: int) -> None:
    first = state[vector.params[0]]
    for key, value in flats.items():
        if not _is_vector(value, numel):
            first[key] = value
            continue
        for p, piece in zip(vector.params, vector.pieces(value), strict=True):
            state[p][key] = piece


def _is_vector(value: Any, numel: int) -> TypeGuard[Tensor]:
    return _may_be_vector(value) and value.ndim > 0 and value.shape[-1] == numel


class Unpacked(NamedTuple):
    """What a state holds for this optimizer, checked.

    Attributes:
        start: The last iterate of CG; None where there is none.
        norms: Squared norms of the Jacobian's columns; None where there are none.
        secant: What quasi-Newton iterations keep; None where there were none.
        entries: The preconditioner's.
        progress: The numbers.
    """

    start: Tensor | None
    norms: Tensor | None
    secant: Secant | None
    entries: dict[str, Any]
    progress: Progress


def unpack(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    vector: ParameterVector,
    preconditioner: Preconditioner,
    space: Space = LOCAL,
) -> Unpacked:
    """What is to be taken from a state that was saved, in the precision it was saved in.

    Raises:
        ValueError: An entry does not fit; the message names it.
    """
    numbers = [i for g in saved["param_groups"] for i in g["params"]]
    params = [p for g in groups for p in g["params"]]
    original = {p: saved["state"].get(i, {}) for i, p in zip(numbers, params, strict=True)}
    progress = saved_progress(saved)
    owners = {id(p) for p, entries in original.items() if "cg_iterate" in entries}
    if owners != {id(p) for p in vector.params}:  # none, or of other parameters: of no use here
        return Unpacked(None, None, None, {}, progress)
    first = {k: v for k, v in original[vector.params[0]].items() if k not in Progress._fields}
    flats: dict[str, Any] = {}
    for key, value in first.items():
        shape = vector.params[0].shape
        lead = value.shape[: value.ndim - len(shape)] if _may_be_vector(value) else ()
        if (
            not _may_be_vector(value)
            or value.shape[len(lead) :] != shape
            or key not in original[vector.params[-1]]
        ):
            flats[key] = value
            continue
        pieces = [original[p].get(key) for p in vector.params]
        for piece, p in zip(pieces, vector.params, strict=True):
            if not _may_be_vector(piece) or piece.shape != (*lead, *p.shape):
                expected = f"in each parameter's state a tensor {(*lead, *p.shape)} in one of them"
                raise refused(key, expected, piece)
        own = space.own(vector.joined(pieces))
        kept = own.dtype if key in SECANT else vector.dtype  # an inverse may be in float64
        flats[key] = own.to(device=vector.device, dtype=kept)
    start = floats("cg_iterate", flats.pop("cg_iterate"), "a vector by parameter")
    norms = flats.pop("column_norms", None)
    if norms is not None:
        norms = floats("column_norms", norms, "a vector by parameter")
    secant = _secant(flats, vector.numel)
    entries = {k.removeprefix(_PREFIX): v for k, v in flats.items()}
    if check := getattr(preconditioner, "check_state", None):  # those brought need have none
        numel = space.length if isinstance(space, Sharded) else vector.numel
        check(entries, _PREFIX, vector.sizes, numel)
    nonzero = space.norm(start) > 0 if space.sharded else bool(torch.any(start))
    known = norms is not None and not space.sharded and bool(torch.any(norms))
    return Unpacked(start if nonzero else None, norms if known else None, secant, entries, progress)


def _secant(flats: dict[str, Any], numel: int) -> Secant | None:
    """What quasi-Newton iterations keep, taken out of the entries."""
    if not any(name in flats for name in SECANT):
        return None
    rows = (numel,), range(2, 2 * pairs_that_fit(numel) + 1, 2), (2,)
    told = numel, f"an even number up to {2 * pairs_that_fit(numel)}", 2
    found: list[Tensor | None] = []
    for name, allowed, text in zip(SECANT, rows, told, strict=True):
        value = flats.pop(name, None)
        if value is None and name != SECANT[-1]:
            found.append(None)
            continue
        expected = f"by parameter a tensor of {text} rows"
        value = floats(name, value, expected)
        if value.ndim != 2 or value.shape[1] != numel or len(value) not in allowed:
            raise refused(name, expected, value)
        found.append(value)
    inverse, pairs, anchor = found
    assert anchor is not None
    return Secant(inverse, pairs, anchor)


def saved_progress(saved: Mapping[str, Any]) -> Progress:
    """The numbers, from whichever parameter has them: the first may have been frozen since."""
    for entries in saved["state"].values():
        if isinstance(entries, Mapping) and "steps" in entries:
            return Progress.restored(entries)
    return Progress()


def upgraded(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A state of any version as this one writes it; what was given is left as it is.

    Version 0.1 had the numbers in the first group, among the options. Options that a version did
    not have take this optimizer's.
    """
    given = list(saved.get("param_groups", []))
    state = dict(saved.get("state", {}))
    old = {k: v for k, v in (given[0] if given else {}).items() if k in Progress._fields}
    if (
        old
        and given[0]["params"]
        and not any(isinstance(e, Mapping) and "steps" in e for e in state.values())
    ):
        owner = next(iter(state), given[0]["params"][0])
        state[owner] = Progress.restored(old)._asdict() | state.get(owner, {})
    known = (*_ALWAYS_WRITTEN, "differentiable")  # torch adds that one to the defaults on loading
    later = {k: v for k, v in defaults.items() if k not in known}
    options = [{k: v for k, v in g.items() if k not in Progress._fields} for g in given]
    groups = [g | {k: v for k, v in later.items() if k not in g} for g in options]
    return {**saved, "state": state, "param_groups": groups}


def check_form(saved: Any) -> None:
    """Complains where a state has not the form that all states have."""
    hint = "Pass what optimizer.state_dict() returned."
    if not isinstance(saved, Mapping):
        raise ValueError(f"The state must be a dict, got {type(saved).__name__}. {hint}")
    for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(saved.get(name), kind):
            got = type(saved[name]).__name__ if name in saved else "none"
            raise ValueError(
                f"The state's entry {name!r} must be a {'dict' if kind is Mapping else 'list'}, "
                f"got {got}. {hint}"
            )
    numbers: list[Any] = []
    for i, group in enumerate(saved["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(
                f"The state's param_groups[{i}] must be a dict with a list 'params'. {hint}"
            )
        numbers += group["params"]
    if not all(isinstance(n, (int, str)) for n in numbers) or len(set(numbers)) != len(numbers):
        raise ValueError(
            "The state's param_groups must number each parameter once in their entries 'params', "
            f"got {numbers!r:.80}. {hint}"
        )
    for n in numbers:
        if not isinstance(saved["state"].get(n, {}), Mapping):
            raise ValueError(f"The state's entry of parameter {n} must be a dict. {hint}")
    for entries in (*saved["state"].values(), *saved["param_groups"][:1]):
        if isinstance(entries, Mapping):
            Progress.check(entries)


def check_state(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Complains of the first entry that does not fit, before anything is loaded."""
    given = saved.get("param_groups", [])
    sizes, own = [len(g["params"]) for g in given], [len(g["params"]) for g in groups]
    if sizes != own:
        raise ValueError(
            f"The state's param_groups must hold {own} parameters, got {sizes}. Make the optimizer "
            "from the same parameters in the same groups as when the state was saved."
        )
    for i, group in enumerate(given):
        for name in _ALWAYS_WRITTEN:
            if name not in group:
                raise ValueError(
                    f"The state's param_groups[{i}] must have the entry {name!r}, got none: it was "
                    "saved by another optimizer or another version of torch_hf. Start with a new "
                    "optimizer; the model's weights are enough."
                )
        try:
            _checks.options(group)
        except (TypeError, ValueError) as error:
            raise ValueError(f"In the state's param_groups[{i}]: {error}") from error
    for name in ("curvature", "preconditioner", "base", "history_size"):
        others = [g[name] for g in given if not _equal(g[name], defaults[name])]
        if others:
            raise ValueError(
                f"The state's {name} must be this optimizer's {defaults[name]!r}, got "
                f"{others[0]!r}. Make the optimizer with the options that it had when the state "
                "was saved."
            )
    params = [p for g in groups for p in g["params"]]
    for i, p in zip([i for g in given for i in g["params"]], params, strict=True):
        for key, value in saved["state"].get(i, {}).items():
            if key not in (*VECTORS, *SECANT, _PREFIX + "s", _PREFIX + "y"):
                continue
            if not _may_be_vector(value):
                raise refused(key, f"a tensor of floating point, of parameter {i}", value)
            shape = tuple(value.shape)
            lead = len(shape) - p.ndim
            if lead != (key not in VECTORS) or shape[lead:] != tuple(p.shape):
                raise ValueError(
                    f"The state's entry {key!r} of parameter {i} must have the parameter's shape "
                    f"{tuple(p.shape)}, got {shape}. Load it into the model that it was saved "
                    "with, or start with a new optimizer."
                )


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _may_be_vector(value: Any) -> TypeGuard[Tensor]:
    return is_dense(value) and value.is_floating_point()
