"""Exact SGD on the implicit weights of Kronecker layers, and on all other parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as plain_sgd

from torch_hf import _checks
from torch_hf.kronecker._deferred_updates import Matrix
from torch_hf.kronecker._geometry import Slot
from torch_hf.kronecker._implicit import ImplicitWeights, layer_of
from torch_hf.kronecker._ranks import Ranks

#: Gradient rows held back by default; benchmarks/kronecker.py compares.
DEFERRED_ROWS = 256
#: And the most numbers in them.
DEFERRED_NUMBERS = 2**24


class KroneckerSGD(torch.optim.Optimizer):
    """``torch.optim.SGD`` for models with a :class:`KroneckerLinear`, after arXiv 2305.08001.

    The implicit weights go exactly where ``torch.optim.SGD`` would take weights ``(m, d)``: the
    same momentum, dampening, Nesterov step and (coupled) weight decay, from the same
    gradients. The step's cost does not depend on d. All other parameters take the plain step.

    Momentum and decay act on all entries alike, so they are gathered in a 2 by 2 matrix of numbers;
    gradients are held back and carried out together. The layer accounts for what is held back, so
    neither is visible but in rounding. Learning-rate schedules work as ever.

    Args:
        params: Parameters or groups of them, those of at least one ``KroneckerLinear`` among them.
        lr: Learning rate η.
        momentum: μ.
        dampening: Of the momentum.
        weight_decay: λ, the factor of w added to the gradient.
        nesterov: Whether the momentum is Nesterov's; needs momentum and no dampening.
        maximize: Ascend.
        max_norm: Scale the gradient of all parameters together to at most this norm, as
            ``torch.nn.utils.clip_grad_norm_`` before each step would scale that of dense weights;
            of a Kronecker layer it takes tr GᵀKG, the squared norm of the implicit weights'
            gradient. None is no limit.
        process_group: The ranks that train together, each on its share of a batch: their gradients
            are averaged here, so the step is that of one process whose loss is the mean of
            theirs. Every rank holds the whole layer. Keep the layer out of
            ``DistributedDataParallel``; the other parameters may be in it.
        defer: Gradient rows (samples) held back before one larger update; 0 is none, None is 256,
            or fewer for very wide layers, and none for pairs in a grid. They take ``defer * m``
            numbers.
        refresh_every: Steps after which correlations are computed anew, to shed what rounding adds
            up to; n² m multiply-adds each time. None is never: see ``KroneckerLinear.drift``.
        **others: None; of an option that cannot be exact, the error says why.

    Raises:
        TypeError: An option is of the wrong type, or no option of SGD.
        ValueError: An option is out of range, or there is no Kronecker layer.

    Example:
        >>> import torch
        >>> from torch_hf.kronecker import KroneckerFactors, KroneckerLinear
        >>> _ = torch.manual_seed(0)
        >>> data = KroneckerFactors(torch.randn(8, 30), torch.randn(8, 40))
        >>> model = torch.nn.Sequential(KroneckerLinear(data, 16), torch.nn.Tanh(),
        ...                             torch.nn.Linear(16, 3))
        >>> optimizer = KroneckerSGD(model.parameters(), lr=1e-3, momentum=0.9)
        >>> batch, target = torch.tensor([1, 5, 6]), torch.tensor([0, 2, 1])
        >>> loss = torch.nn.functional.cross_entropy(model(batch), target)
        >>> loss.backward()
        >>> optimizer.step()
    """

    #: For the layers, which refuse other optimizers.
    serves_kronecker_layers = True
    _ranks = Ranks(None, torch.device("cpu"))

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        process_group: Any = None,
        defer: int | None = None,
        refresh_every: int | None = None,
        **others: Any,
    ) -> None:
        if others:
            raise TypeError(_no_option(next(iter(others))))
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                "params must be parameters, got a module. Write "
                "KroneckerSGD(model.parameters(), lr=…)."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "max_norm": max_norm,
            "defer": defer,
            "refresh_every": refresh_every,
        }
        _check_options(defaults)
        super().__init__(params, defaults)
        if not self._layers():
            raise ValueError(
                "The parameters must include those of a KroneckerLinear, got none of them. For "
                "other models use torch.optim.SGD. For this one, pass the parameters of the model "
                "that holds the layer: KroneckerSGD(model.parameters(), lr=…)."
            )
        self.register_state_dict_pre_hook(_settle_first)
        self._ranks = Ranks(process_group, self._layers()[0].products.device)
        self._ranks.check_same_start(self._layers(), self._others())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as ``torch.optim.SGD`` does.

        Raises:
            TypeError, ValueError: An option of the group is wrong.
        """
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group})
            limit = param_group.get("max_norm", self.defaults["max_norm"])
            if limit != self.defaults["max_norm"]:
                raise ValueError(
                    f"max_norm must be one number for all groups, got {limit!r} for one of them. "
                    f"Give it once: KroneckerSGD(groups, max_norm={limit!r})."
                )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step along the gradients that ``backward()`` left.

        Args:
            closure: Computes the loss anew and returns it, as in ``torch.optim.SGD``; optional.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: Something else changed a Kronecker layer's parameter or gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = self._gradients()
        share = self._share(taken)
        for group in self.param_groups:
            others = []
            for p in group["params"]:
                layer, found = layer_of(p), taken.get(p)
                if found is None:
                    continue
                if layer is not None:
                    self._step_layer(layer, group, found, share)
                else:
                    others.append((p, found if share == 1.0 else found * share))
            self._step_others(others, group)
        return loss

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """The norm of the gradient of all parameters, implicit weights in place of coefficients.

        What ``clip_grad_norm_`` would report of dense weights; B² (m + p + q) multiply-adds for a
        batch of B. Of several ranks, that of their mean.

        Raises:
            RuntimeError: Something else changed a Kronecker layer's parameter or gradient.
        """
        return self._norm(self._gradients())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where a saved optimizer stood; load the model's own state as well.

        Raises:
            ValueError: The groups differ.
        """
        for layer in self._layers():
            layer._detach()
        super().load_state_dict(state_dict)
        for state in self.state.values():  # what was loaded stays the caller's
            state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})

    def _layers(self) -> list[ImplicitWeights]:
        found = (layer_of(p) for group in self.param_groups for p in group["params"])
        return [layer for layer in found if layer is not None]

    def _others(self) -> list[Tensor]:
        params = (p for group in self.param_groups for p in group["params"])
        return [p for p in params if layer_of(p) is None]

    def _gradients(self) -> dict[Tensor, Any]:
        """Of each parameter with a gradient, the mean over ranks; of a layer (samples, rows)."""
        found: dict[Tensor, Any] = {}
        for group in self.param_groups:
            for p in group["params"]:
                layer = layer_of(p)
                if p.grad is not None:
                    found[p] = p.grad if layer is None else layer._held_gradient()
        every = [p for group in self.param_groups for p in group["params"]]
        return self._ranks.mean(every, found)

    def _norm(self, taken: dict[Tensor, Any]) -> float:
        total = 0.0
        for p, found in taken.items():
            layer = layer_of(p)
            if layer is not None:
                total += layer._squared_norm(*found)
            else:
                values = found.coalesce().values() if found.is_sparse else found
                total += float(values.double().square().sum())
        return math.sqrt(total)

    def _share(self, taken: dict[Tensor, Any]) -> float:
        """What ``max_norm`` leaves of the gradient, as ``clip_grad_norm_`` has it."""
        limit = self.param_groups[0]["max_norm"]
        return 1.0 if limit is None else min(1.0, limit / (self._norm(taken) + 1e-6))

    def _step_layer(
        self, layer: ImplicitWeights, group: dict[str, Any], found: Any, share: float
    ) -> None:
        state = self.state[layer.coefficients]
        first = bool(group["momentum"]) and "velocity_coefficients" not in state
        if first:
            state["velocity_coefficients"] = torch.zeros_like(layer.coefficients)
            state["velocity_correlations"] = torch.zeros_like(layer.products)
            state["velocity_anchor"] = 0.0
        for name, like in (("coefficients", layer.coefficients), ("correlations", layer.products)):
            kept = state.get(f"velocity_{name}")
            if kept is not None and (kept.dtype, kept.device) != (like.dtype, like.device):
                state[f"velocity_{name}"] = kept.to(like.device, like.dtype)  # the layer was moved
        velocity = state.get("velocity_coefficients")
        held = layer._span.velocity
        if velocity is not None and (held is None or held.coefficients is not velocity):
            slot = Slot(velocity, state["velocity_correlations"])
            layer._detach()
            layer._attach(slot, state["velocity_anchor"])
        elif velocity is None and held is not None:  # another optimizer's
            layer._detach()
        transition, gain = linear_step(group, first)
        if velocity is None:
            transition, gain = [[transition[0][0]]], gain[:1]
        gain = [share * u for u in gain]
        layer._advance(transition, gain, _capacity(group["defer"], layer), *found)
        state["step"] = state.get("step", 0) + 1
        if group["refresh_every"] and state["step"] % group["refresh_every"] == 0:
            layer.refresh()

    def _step_others(self, taken: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        params, gradients = [p for p, _ in taken], [g for _, g in taken]
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        names = ("weight_decay", "momentum", "dampening", "nesterov", "maximize")
        options = {name: group[name] for name in names}
        sparse = any(g.is_sparse for g in gradients)
        plain_sgd(
            params, gradients, buffers, has_sparse_grad=sparse, lr=float(group["lr"]), **options
        )
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer


def linear_step(group: dict[str, Any], first: bool) -> tuple[Matrix, list[float]]:
    """SGD as (w, v) ← M (w, v) + u g: M and u, the same for all entries.

    Written out, with g' = ±g + λ w (- for ``maximize``):
    v ← μ v + c g', c = 1 - dampening (1 at first), and w ← w - η (e g' + f v), with (e, f) =
    (0, 1), Nesterov's (1, μ), or (1, 0) without momentum, which leaves v alone.
    """
    lr, decay, momentum = (float(group[k]) for k in ("lr", "weight_decay", "momentum"))
    sign = -1.0 if group["maximize"] else 1.0
    if not momentum:
        return [[1.0 - lr * decay, 0.0], [0.0, 1.0]], [-lr * sign, 0.0]
    c = 1.0 if first else 1.0 - float(group["dampening"])
    e, f = (1.0, momentum) if group["nesterov"] else (0.0, 1.0)
    direct = lr * (e + f * c)
    transition = [[1.0 - direct * decay, -lr * f * momentum], [c * decay, momentum]]
    return transition, [-direct * sign, c * sign]


def _capacity(defer: int | None, layer: ImplicitWeights) -> int:
    if defer is not None:
        return defer
    if layer._grid is not None:  # an update costs no more than one held back
        return 0
    return min(DEFERRED_ROWS, DEFERRED_NUMBERS // layer.coefficients.shape[1])


def _settle_first(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            layer, state = layer_of(p), optimizer.state.get(p, {})
            if layer is None or "velocity_anchor" not in state:
                continue
            held = layer._span.velocity
            if held is not None and held.coefficients is state["velocity_coefficients"]:
                layer.settle()
                state["velocity_anchor"] = layer._span.anchors[1]


def _check_options(group: dict[str, Any]) -> None:
    lr = group["lr"]
    lr = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
    _checks.number("lr", lr, low=0.0, hint="lr=0.1 is usual.")
    _checks.number("momentum", group["momentum"], low=0.0, high=1.0, hint="momentum=0.9 is usual.")
    _checks.number("dampening", group["dampening"], low=0.0, high=1.0, hint="dampening=0 is none.")
    _checks.number("weight_decay", group["weight_decay"], low=0.0, hint="weight_decay=0 is none.")
    for name in ("nesterov", "maximize"):
        _checks.flag(name, group[name])
    if group["nesterov"] and not (group["momentum"] and not group["dampening"]):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening=0, got momentum={group['momentum']} "
            f"and dampening={group['dampening']}."
        )
    if group["max_norm"] is not None:
        _checks.number("max_norm", group["max_norm"], low=0.0, hint="max_norm=None is no limit.")
    if group["defer"] is not None:
        _checks.count("defer", group["defer"], low=0, hint="defer=0 updates at once.")
    if group["refresh_every"] is not None:
        _checks.count("refresh_every", group["refresh_every"], low=1, hint="None is never.")


def _no_option(name: str) -> str:
    if name in ("betas", "eps", "amsgrad", "alpha", "rho", "lr_decay", "centered", "etas"):
        return (
            f"KroneckerSGD has no option {name!r}. Rules that scale each entry of the gradient "
            "separately, such as Adam and RMSprop, leave the span of the inputs and need the "
            "weights. Use lr, momentum and weight_decay, or a dense layer with that optimizer."
        )
    return (
        f"KroneckerSGD has no option {name!r}. It takes lr, momentum, dampening, weight_decay, "
        "nesterov, maximize, max_norm, process_group, defer and refresh_every."
    )
