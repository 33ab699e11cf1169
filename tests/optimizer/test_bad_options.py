"""Wrong options and parameters of the constructor, and the error each must give."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from bad_input import assert_says, mse, network
from snapshots import assert_identical, snapshot
from torch import Tensor, nn

from torch_hf import HFOptimizer, LBFGSPreconditioner
from torch_hf.preconditioner import DiagonalPreconditioner
from torch_hf.vector import check_parameters


class BadOption(NamedTuple):
    """Arguments of the constructor, the error's type and the words it must hold."""

    name: str
    options: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]


class _Unfinished:
    def apply(self, r: Tensor) -> Tensor:
        return r


_NUMBER = "must be a number"
_PROTOCOL = (
    "preconditioner must be a name, or an object with wants_layers and the methods",
    "begin, apply, observe",
)
BAD_OPTIONS = (
    BadOption("lr-negative", {"lr": -0.1}, ValueError, ("lr must be", "at least 0", "-0.1")),
    BadOption("lr-nan", {"lr": float("nan")}, ValueError, ("lr must be a finite number", "nan")),
    BadOption("lr-inf", {"lr": float("inf")}, ValueError, ("lr must be a finite number", "1.0 is")),
    BadOption("lr-text", {"lr": "1"}, TypeError, ("lr " + _NUMBER, "str '1'", "1.0 is")),
    BadOption("lr-bool", {"lr": True}, TypeError, ("lr " + _NUMBER, "bool True")),
    BadOption("lr-none", {"lr": None}, TypeError, ("lr " + _NUMBER, "NoneType")),
    BadOption("damping-negative", {"damping": -1.0}, ValueError, ("damping must be", "None")),
    BadOption("damping-nan", {"damping": float("nan")}, ValueError, ("damping must be", "nan")),
    BadOption("damping-text", {"damping": "auto"}, TypeError, ("damping " + _NUMBER, "None")),
    BadOption("decay-negative", {"weight_decay": -1}, ValueError, ("weight_decay must be", "0 is")),
    BadOption("decay-list", {"weight_decay": [0.1]}, TypeError, ("weight_decay " + _NUMBER,)),
    BadOption("history-odd", {"history_size": 3}, ValueError, ("even number", "got 3", '"none"')),
    BadOption("history-zero", {"history_size": 0}, ValueError, ("even number", "got 0", '"none"')),
    BadOption("history-negative", {"history_size": -2}, ValueError, ("even number", "-2")),
    BadOption("history-float", {"history_size": 4.0}, ValueError, ("even number", "4.0")),
    BadOption(
        "max_iter-zero",
        {"cg_max_iter": 0},
        ValueError,
        ("cg_max_iter", "at least 1", "None chooses"),
    ),
    BadOption("max_iter-float", {"cg_max_iter": 9.0}, TypeError, ("cg_max_iter must be an int",)),
    BadOption("max_iter-bool", {"cg_max_iter": True}, TypeError, ("cg_max_iter must be an int",)),
    BadOption("tol-negative", {"cg_tol": -1e-4}, ValueError, ("cg_tol must be", "from 0 to 1")),
    BadOption("tol-large", {"cg_tol": 2.0}, ValueError, ("cg_tol must be", "5e-3 is usual")),
    BadOption("tol-none", {"cg_tol": None}, TypeError, ("cg_tol " + _NUMBER, "5e-3 is usual")),
    BadOption("decay-large", {"cg_decay": 1.1}, ValueError, ("cg_decay must be", "from 0 to 1")),
    BadOption("decay-nan", {"cg_decay": float("nan")}, ValueError, ("cg_decay must be", "None")),
    BadOption("curvature", {"curvature": "gn"}, ValueError, ("'ggn', 'hessian'", "'gn'")),
    BadOption("curvature-none", {"curvature": None}, ValueError, ("'ggn', 'hessian'", "None")),
    BadOption(
        "preconditioner-name",
        {"preconditioner": "bfgs"},
        ValueError,
        (
            "lbfgs, kronecker-lbfgs, kronecker, diagonal, none",
            "LBFGSPreconditioner(history_size=32)",
            "'bfgs'",
        ),
    ),
    BadOption("preconditioner-none", {"preconditioner": None}, TypeError, _PROTOCOL),
    BadOption("preconditioner-object", {"preconditioner": _Unfinished()}, TypeError, _PROTOCOL),
    BadOption(
        "preconditioner-class", {"preconditioner": LBFGSPreconditioner}, TypeError, _PROTOCOL
    ),
    BadOption(
        "preconditioner-other_class",
        {"preconditioner": DiagonalPreconditioner},
        TypeError,
        _PROTOCOL,
    ),
    BadOption("maximize-int", {"maximize": 1}, TypeError, ("maximize must be True or False", "1")),
    BadOption("maximize-text", {"maximize": "yes"}, TypeError, ("maximize must be True or False",)),
)


@pytest.mark.parametrize("row", BAD_OPTIONS, ids=lambda row: row.name)
def test_bad_options(row):
    model = network()
    with pytest.raises(row.error) as caught:
        HFOptimizer(model.parameters(), **row.options)
    assert_says(caught.value, row.says)


OF_A_GROUP = [row for row in BAD_OPTIONS if row.options.keys() <= {"lr", "weight_decay"}]


@pytest.mark.parametrize("row", OF_A_GROUP, ids=lambda row: row.name)
def test_bad_options_of_a_group(row):
    model = network()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[3].parameters(), **row.options},
    ]
    with pytest.raises(row.error) as caught:
        HFOptimizer(groups)
    assert_says(caught.value, row.says)
    optimizer = HFOptimizer(model[0].parameters())
    with pytest.raises(row.error) as caught:
        optimizer.add_param_group(groups[1] | {"params": model[3].parameters()})
    assert_says(caught.value, row.says)
    assert len(optimizer.param_groups) == 1


class BadParameters(NamedTuple):
    name: str
    params: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


def _frozen() -> Iterable[Tensor]:
    return network().requires_grad_(False).parameters()


def _integers() -> list[Tensor]:
    return [nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)]


def _complex() -> list[Tensor]:
    return [nn.Parameter(torch.ones(2, dtype=torch.complex64))]


def _scattered() -> list[Tensor]:
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]


BAD_PARAMETERS = (
    BadParameters("none", lambda: [], ValueError, ("empty parameter list",)),
    BadParameters("tensor", lambda: torch.ones(2), TypeError, ("an iterable of Tensors",)),
    BadParameters("number", lambda: [1.0], TypeError, ("can only optimize Tensors",)),
    BadParameters(
        "frozen",
        _frozen,
        ValueError,
        ("requires_grad=True, got none", "model.requires_grad_(True)"),
    ),
    BadParameters(
        "integers",
        _integers,
        ValueError,
        ("requires_grad=True, got none", "Pass model.parameters()"),
    ),
    BadParameters(
        "complex",
        _complex,
        TypeError,
        ("real floating-point tensors", "torch.complex64", "torch.complex(real, imag)"),
    ),
    BadParameters(
        "devices",
        _scattered,
        ValueError,
        ("must be on one device", "cpu, meta", "model.to(device)"),
    ),
)


@pytest.mark.parametrize("row", BAD_PARAMETERS, ids=lambda row: row.name)
def test_bad_parameters(row):
    with pytest.raises(row.error) as caught:
        HFOptimizer(row.params())
    assert_says(caught.value, row.says)


def test_a_bad_option_set_later_is_found_at_the_step():
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters()}]
    optimizer = HFOptimizer(groups)
    optimizer.param_groups[1]["weight_decay"] = -1.0
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="weight_decay must be"):
        optimizer.step(lambda: mse(model))
    assert_identical(snapshot(model, optimizer), before)


def test_a_device_without_float64_is_refused():
    """A stand-in: this machine has no such device."""
    parameter = SimpleNamespace(
        device=torch.device("mps"), dtype=torch.float32, is_floating_point=lambda: True
    )
    with pytest.raises(ValueError) as caught:
        check_parameters([parameter])
    assert_says(caught.value, ("has float64", "got mps", "model.cpu()"))
