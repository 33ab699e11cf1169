"""Wrong closures and batches, the error each must give, and nothing changed by it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from bad_input import BATCH, BATCHES, X, Y, assert_says, mse, network
from snapshots import assert_identical, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer

CLASSES = torch.tensor([0, 1, 1, 0, 1, 0])


class BadStep(NamedTuple):
    """What is wrong with a step: a closure of a model, arguments of `step`."""

    name: str
    closure: Callable[..., Any] | None
    error: type[Exception]
    says: tuple[str, ...]
    step: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012


def _backward_then(value: Any) -> Callable[[nn.Module], Any]:
    def closure(model):
        mse(model).backward()
        return value

    return closure


def _backward_of_a_vector(model):
    loss = F.mse_loss(model(X), Y, reduction="none")
    loss.backward()
    return loss.mean()


def _scaled(factor: float) -> Callable[[nn.Module], Tensor]:
    return lambda model: mse(model) * factor


def _second_call(model):
    return mse(model), model(X)


def _probabilities_beside_logits(model):
    z = model(X)
    return F.cross_entropy(z, CLASSES), z.softmax(1)


def _hidden_and_output(model):
    hidden = model[0](X)
    z = model[3](hidden)
    return F.mse_loss(z, Y).sqrt() + hidden.square().mean(), (hidden, z)


def _same_output_twice(model):
    z = model(X)
    return mse(model) * 0 + F.huber_loss(z, Y).sqrt(), (z, z)


def _around_the_outputs(model):
    z = model(X)
    return (model[3].weight.square().sum() * z.square().sum()).sqrt(), z


def _nll_by_hand(model):
    z = model(X)
    return F.nll_loss(z - z.logsumexp(1, keepdim=True), CLASSES)


def _kl_by_hand(model):
    z = model(X)
    return F.kl_div(z - z.logsumexp(1, keepdim=True), Y.softmax(1), reduction="batchmean")


def _linear_in_log_probabilities(model):
    log_p = model(X).log_softmax(1)
    return F.nll_loss(log_p, CLASSES), log_p


def _hinge(model):
    z = model(X)
    return F.relu(1 - z).mean(), z


def _two_distributions(model):
    z = model(X)
    return F.kl_div(z.log_softmax(1), z.flip(0).softmax(1), reduction="batchmean")


def _another_model(model):
    return mse(network())


def _of_batch(loss: Callable[..., Any]) -> Callable[..., Any]:
    def closure(model, batch):
        z = model(batch[0])
        return loss(z, *batch[1:])

    return closure


def _several_denominators(z, y, classes):
    return F.mse_loss(z, y) + F.cross_entropy(z, classes)


def _explicit_cases(cases: Any) -> Callable[..., Any]:
    return _of_batch(lambda z, y, c: (F.mse_loss(z, y), z, cases))


_OWN_LOSS = _of_batch(lambda z, y, c: (z - y).square().logsumexp(1).mean())
_BATCH_LOSS = _of_batch(lambda z, y, c: F.mse_loss(z, y))
_FORM_3 = ("return loss, outputs", 'curvature="hessian"')
_RETURN = ("`return loss`",)
_TAKES_ONE = ("takes", "batches")
BAD_STEPS = (
    BadStep("no_closure", None, RuntimeError, ("needs a closure", "optimizer.step(closure)")),
    BadStep("no_callable", 3.0, TypeError, ("needs a closure", "got float", "def closure()")),
    BadStep("none", lambda m: None, TypeError, ("must return the loss, got None", *_RETURN)),
    BadStep(
        "none_after_backward",
        _backward_then(None),
        TypeError,
        ("must return the loss, got None", *_RETURN),
    ),
    BadStep("vector", lambda m: m(X), ValueError, ("one element", "(6, 2)", "loss.mean()")),
    BadStep("backward_of_vector", _backward_of_a_vector, ValueError, ("(6, 2)", "loss.mean()")),
    BadStep("int", lambda m: 0, TypeError, ("must be a tensor, got int", "loss.backward()")),
    BadStep("item", lambda m: mse(m).item(), TypeError, ("must be a tensor, got float", "item()")),
    BadStep("dict", lambda m: {"loss": mse(m)}, TypeError, ("must be a tensor, got dict",)),
    BadStep("constant", lambda m: torch.ones(()), RuntimeError, ("a constant", "detach()")),
    BadStep("detached", lambda m: mse(m).detach(), RuntimeError, ("a constant", "without detach")),
    BadStep(
        "backward_of_constant",
        lambda m: torch.ones(()).backward() or torch.ones(()),
        RuntimeError,
        ("a constant", "torch.no_grad()"),
    ),
    BadStep(
        "nan",
        _scaled(float("nan")),
        RuntimeError,
        ("loss must be finite, got nan", "Check the batch"),
    ),
    BadStep(
        "inf",
        _scaled(float("inf")),
        RuntimeError,
        ("loss must be finite, got inf", "Check the batch"),
    ),
    BadStep(
        "minus_inf",
        _scaled(-float("inf")),
        RuntimeError,
        ("loss must be finite, got -inf", "log(0)"),
    ),
    BadStep(
        "another_model",
        _another_model,
        RuntimeError,
        ("must depend on a parameter", "HFOptimizer(model.parameters())"),
    ),
    BadStep("one_in_tuple", lambda m: (mse(m),), TypeError, ("tuple of 1", *_RETURN)),
    BadStep("four_in_tuple", lambda m: [mse(m)] * 4, TypeError, ("list of 4", *_RETURN)),
    BadStep(
        "outputs_number",
        lambda m: (mse(m), 1.0),
        TypeError,
        ("must be a tensor or a tuple of tensors",),
    ),
    BadStep(
        "outputs_none",
        lambda m: (mse(m), None),
        TypeError,
        ("must be a tensor or a tuple of tensors",),
    ),
    BadStep(
        "outputs_mixed", lambda m: (mse(m), (m(X), 2)), TypeError, ("must be a tensor or a tuple",)
    ),
    BadStep("outputs_empty", lambda m: (mse(m), ()), RuntimeError, ("must be connected",)),
    BadStep(
        "outputs_detached",
        lambda m: (mse(m), m(X).detach()),
        RuntimeError,
        ("connected", "none that requires a gradient", "not detached"),
    ),
    BadStep(
        "outputs_of_second_call",
        _second_call,
        RuntimeError,
        ("not connected", "outputs = model(x)", "call the model a second time"),
    ),
    BadStep(
        "outputs_beside_the_loss",
        _probabilities_beside_logits,
        RuntimeError,
        ("not connected", "Return the same tensors"),
    ),
    BadStep(
        "outputs_hang_together",
        _hidden_and_output,
        RuntimeError,
        ("Output 1", "computed from another", "Return only"),
    ),
    BadStep(
        "outputs_twice",
        _same_output_twice,
        RuntimeError,
        ("Output 0", "another of the outputs", "Return only"),
    ),
    BadStep(
        "outputs_and_parameters_mixed",
        _around_the_outputs,
        RuntimeError,
        ("through the outputs", "and directly", "Return as outputs"),
    ),
    BadStep(
        "linear_in_outputs",
        _linear_in_log_probabilities,
        RuntimeError,
        ("linear in the outputs", "the logits", 'curvature="hessian"'),
    ),
    BadStep(
        "hinge_of_outputs",
        _hinge,
        RuntimeError,
        ("has no curvature", "first-order optimizer"),
    ),
    BadStep("mean", lambda m: m(X).mean(), RuntimeError, ("linear in the outputs", "Adam")),
    BadStep(
        "sine",
        lambda m: mse(m).sin(),
        RuntimeError,
        ("No Gauss-Newton split", "not a sum of torch's convex loss functions", *_FORM_3),
    ),
    BadStep("nll_by_hand", _nll_by_hand, RuntimeError, ("F.cross_entropy", "nll_loss", *_FORM_3)),
    BadStep("kl_by_hand", _kl_by_hand, RuntimeError, ("F.log_softmax", "kl_div", *_FORM_3)),
    BadStep("two_distributions", _two_distributions, RuntimeError, ("target.detach()", *_FORM_3)),
    BadStep(
        "l1",
        lambda m: F.l1_loss(m(X), Y),
        RuntimeError,
        ("l1_loss has no curvature", "F.huber_loss", "torch.optim.Adam"),
    ),
    BadStep(
        "hessian_of_linear",
        lambda m: m[3].bias.sum(),
        RuntimeError,
        ("linear in the parameters", "Use a first-order optimizer"),
        options={"curvature": "hessian"},
    ),
    BadStep(
        "batches-empty",
        _BATCH_LOSS,
        ValueError,
        ("batches must hold at least one batch, got none",),
        {"batches": []},
    ),
    BadStep(
        "batches-spent",
        _BATCH_LOSS,
        ValueError,
        ("at least one batch, got none",),
        {"batches": iter(())},
    ),
    BadStep("batches-tensor", _BATCH_LOSS, TypeError, ("batches=[batch]",), {"batches": X}),
    BadStep(
        "batches-dict",
        _BATCH_LOSS,
        TypeError,
        ("got dict", "batches=[batch]"),
        {"batches": {"x": X}},
    ),
    BadStep(
        "batches-number", _BATCH_LOSS, TypeError, ("got int", "batches=[batch]"), {"batches": 3}
    ),
    BadStep("batches-array", _BATCH_LOSS, TypeError, ("ndarray",), {"batches": X.numpy()}),
    BadStep(
        "curvature_batches-alone",
        mse,
        ValueError,
        ("must come with batches", "step(closure, batches=[batch], curvature_batches=[part])"),
        {"curvature_batches": [BATCH]},
    ),
    BadStep(
        "curvature_batches-empty",
        _BATCH_LOSS,
        ValueError,
        ("curvature_batches must hold at least one batch", "curvature_batches=[batch]"),
        {"batches": BATCHES, "curvature_batches": []},
    ),
    BadStep(
        "curvature_batches-tensor",
        _BATCH_LOSS,
        TypeError,
        ("curvature_batches must be a list", "split_batch(batch, size)"),
        {"batches": BATCHES, "curvature_batches": X},
    ),
    BadStep(
        "closure_takes_none",
        mse,
        TypeError,
        ("must take one argument", "def closure(batch)"),
        {"batches": BATCHES},
    ),
    BadStep(
        "closure_takes_one",
        _BATCH_LOSS,
        TypeError,
        ("requires an argument", "def closure()", "batches=[batch]"),
    ),
    BadStep(
        "several_denominators",
        _of_batch(_several_denominators),
        ValueError,
        ("must have a number of cases in common", "`return loss, outputs, cases`"),
        {"batches": BATCHES},
    ),
    BadStep(
        "several_denominators-curvature",
        _of_batch(_several_denominators),
        ValueError,
        ("curvature_batches", "`return loss, outputs, cases`"),
        {"batches": [BATCH], "curvature_batches": BATCHES},
    ),
    BadStep(
        "mean_and_sum",
        _of_batch(lambda z, y, c: F.mse_loss(z, y) + z.square().sum()),
        ValueError,
        ("must have a number of cases in common", "`return loss, outputs, cases`"),
        {"batches": BATCHES},
    ),
    BadStep(
        "cases_unknown",
        _OWN_LOSS,
        ValueError,
        ("must have a number of cases in common", "`return loss, outputs, cases`"),
        {"batches": BATCHES},
        {"curvature": "hessian"},
    ),
    *(
        BadStep(
            f"cases-{cases}",
            _explicit_cases(cases),
            error,
            (says, "`return loss, outputs, len(x)`"),
            {"batches": BATCHES},
        )
        for cases, error, says in (
            (0, ValueError, "cases must be positive, got 0"),
            (-2.0, ValueError, "cases must be positive, got -2"),
            (float("nan"), ValueError, "cases must be positive, got nan"),
            ("seven", TypeError, "cases must be a number, got str"),
            (None, TypeError, "cases must be a number, got NoneType"),
        )
    ),
)


def bound(closure: Any, model: nn.Module, optimizer: HFOptimizer) -> Any:
    """A closure of the model as the optimizer calls it, zeroing gradients in place."""
    if not callable(closure):
        return closure
    if closure.__code__.co_argcount == 2:

        def of_batch(batch):
            optimizer.zero_grad(set_to_none=False)
            return closure(model, batch)

        return of_batch

    def alone():
        optimizer.zero_grad(set_to_none=False)
        return closure(model)

    return alone


#: A loss that is not finite is bad input to the first step; later the step is rejected.
AT_FIRST = {"nan", "inf", "minus_inf"}


@pytest.mark.parametrize(
    ("row", "used"),
    [
        (row, used)
        for row in BAD_STEPS
        for used in (False, True)
        if not (used and row.name in AT_FIRST)
    ],
    ids=lambda x: x.name if isinstance(x, BadStep) else ["fresh", "used"][x],
)
def test_bad_steps_say_what_to_do_and_change_nothing(row, used):
    model = network()
    optimizer = HFOptimizer(model.parameters(), cg_max_iter=3, **row.options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if used:
        optimizer.step(lambda: mse(model))
    before = snapshot(model, optimizer)
    with pytest.raises(row.error) as caught:
        optimizer.step(bound(row.closure, model, optimizer), **row.step)
    assert_says(caught.value, row.says)
    assert_identical(snapshot(model, optimizer), before)


def test_no_closure_is_an_error_where_there_are_gradients():
    model = network()
    optimizer = HFOptimizer(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"needs a closure .*optimizer\.step\(closure\)"):
        optimizer.step()
    assert_identical(snapshot(model, optimizer), before)


def test_no_message_speaks_of_what_a_user_does_not_know():
    """Messages speak of closures, losses, outputs and batches, and end in a full stop."""
    for row in BAD_STEPS:
        model = network()
        optimizer = HFOptimizer(model.parameters(), cg_max_iter=3, **row.options)
        with pytest.raises(row.error) as caught:
            optimizer.step(bound(row.closure, model, optimizer), **row.step)
        message = str(caught.value)
        assert message.endswith((".", "`.", ")."))
        assert not any(word in message for word in ("Backward", "record", "edge", "node"))
