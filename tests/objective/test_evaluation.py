"""An objective is asked with its evaluation, and an operator not after its release."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf.curvature import GaussNewtonOperator, ObjectiveOperator
from torch_hf.curvature.layer_statistics import LayerStatistics
from torch_hf.distributed import Reducer
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.vector import ParameterVector

X = torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3)
Y = torch.tensor([0, 1, 1, 0, -100, 1, -100])
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]  # of four cases and of one


class Problem:
    """A network and a closure that counts its runs."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.params = list(self.model.parameters())
        self.runs = 0

    def closure(self, batch=(X, Y)):
        self.runs += 1
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def summed(self, batch):
        return F.cross_entropy(self.model(batch[0]), batch[1], reduction="sum")

    def objective(self, closure=None, **options):
        vector = ParameterVector(self.params)
        options = {"decay": [0.0] * len(self.params), "layers": True} | options
        reducer = Reducer(None, vector.device)
        return Objective(
            closure or self.closure, vector, Replay(vector.device), reducer=reducer, **options
        )


@pytest.mark.parametrize("ask", [Objective.trial_loss, Objective.gradient_variance])
def test_what_needs_an_evaluation_cannot_be_asked_without(ask):
    (_, here) = inspect.signature(ask).parameters.values()
    assert here.default is inspect.Parameter.empty
    problem = Problem()
    with pytest.raises(TypeError):
        ask(problem.objective())
    assert problem.runs == 0


def test_an_objective_holds_nothing_of_an_evaluation():
    """So that none can be stale: what it holds changes by nothing but a count."""
    problem = Problem()
    objective = problem.objective(batches=BATCHES)
    before = dict(vars(objective))
    here = objective.evaluate()
    objective.gradient_variance(here)
    operator = ObjectiveOperator(objective, "ggn", here=here)
    operator(here.gradient)
    operator.release()
    assert vars(objective).keys() == before.keys()
    assert all(vars(objective)[k] is v for k, v in before.items())
    objective.trial_loss(here)
    assert {k for k, v in before.items() if vars(objective)[k] is not v} == {"evaluations"}


def test_each_evaluation_has_its_own_weights():
    problem = Problem()
    batches = [list(batch) for batch in BATCHES]
    objective = problem.objective(batches=batches)
    first = objective.evaluate()
    assert first.weights == [0.8, 0.2]
    batches[1][1] = torch.tensor([0, 1, 1])
    second = objective.evaluate()
    assert (first.weights, first.cases) == ([0.8, 0.2], 5.0)
    assert (second.weights, second.cases) == ([4 / 7, 3 / 7], 7.0)
    assert objective.trial_loss(second) == second.loss


# The graph goes from the evaluation to the operator


@pytest.mark.parametrize(
    ("options", "kept", "runs"),
    [
        ({}, True, [1, 1]),
        ({"batches": BATCHES[:1]}, True, [1, 1]),
        ({"batches": BATCHES}, False, [2, 4]),
        ({"batches": BATCHES[:1], "curvature_batches": BATCHES[:1]}, False, [1, 2]),
    ],
)
def test_a_single_batch_runs_once_for_gradient_and_products(options, kept, runs):
    problem = Problem()
    objective = problem.objective(**options)
    here = objective.evaluate()
    counts = [problem.runs]
    assert (here.graph is not None) is kept
    operator = ObjectiveOperator(objective, "ggn", here=here)
    counts.append(problem.runs)
    assert here.graph is None
    product = operator(here.gradient)
    assert counts == runs
    alone = ObjectiveOperator(objective, "ggn", here=objective.evaluate())
    assert torch.equal(alone(here.gradient), product)


def test_the_variance_is_the_same_before_and_after_the_graph_is_taken():
    problem = Problem()
    objective = problem.objective()
    here = objective.evaluate()
    before = objective.gradient_variance(here)
    assert problem.runs == 1
    here.take_graph()
    assert objective.gradient_variance(here) == before > 0
    assert problem.runs == 2


def test_an_operator_on_a_sample_needs_the_evaluation_that_it_stands_for():
    """Without it a sum over the sample had weight 0, and so had every product."""
    problem = Problem()
    options = {"batches": BATCHES, "curvature_batches": BATCHES[:1]}
    objective = problem.objective(problem.summed, **options)
    with pytest.raises(RuntimeError, match=r"here=objective\.evaluate\(\)"):
        ObjectiveOperator(objective, "ggn")
    here = objective.evaluate()
    v = torch.ones_like(here.gradient)
    found = ObjectiveOperator(objective, "ggn", here=here)(v)
    part = problem.objective(problem.summed, batches=BATCHES[:1])
    truth = ObjectiveOperator(part, "ggn", here=part.evaluate())(v) * 7 / 4
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)


# After release


def of_the_step(problem):
    objective = problem.objective()
    return ObjectiveOperator(objective, "ggn", here=objective.evaluate())


def of_batches(problem):
    return ObjectiveOperator(problem.objective(batches=BATCHES), "ggn")


def of_a_closure(problem):
    return GaussNewtonOperator.from_closure(problem.closure, problem.params)


def by_differences(problem):
    return GaussNewtonOperator.from_closure(problem.closure, problem.params, "finite_differences")


QUESTIONS = {
    "product": lambda operator: operator(torch.ones(operator.objective.vector.numel).double()),
    "graph": lambda operator: operator.graph(0),
    "diagonal": lambda operator: LayerStatistics(operator).diagonal(1.0),
    "factors": lambda operator: LayerStatistics(operator).factors(0),
}


@pytest.mark.parametrize("make", [of_the_step, of_batches, of_a_closure, by_differences])
@pytest.mark.parametrize("question", QUESTIONS)
def test_an_operator_says_that_it_was_released(make, question):
    problem = Problem()
    operator = make(problem)
    ask = QUESTIONS[question]
    if question == "product" or make in (of_the_step, of_batches):  # which record layers
        ask(operator)
    runs, products = problem.runs, operator.products
    operator.release()
    operator.release()
    with pytest.raises(RuntimeError, match=r"was released.*before release\(\)"):
        ask(operator)
    assert problem.runs == runs
    assert operator.products == products


# The gradient goes from the evaluation to .grad


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("batches", [None, BATCHES[:1], BATCHES])
def test_gradients_are_handed_over_once(decay, maximize, batches):
    problem = Problem()
    losses = [problem.closure(batch) for batch in batches or [(X, Y)]]
    weights = [0.8, 0.2] if batches and len(batches) == 2 else [1.0]
    loss = sum(w * x for w, x in zip(weights, losses, strict=True))
    truth = torch.autograd.grad(loss, problem.params)
    objective = problem.objective(
        batches=batches, decay=[decay] * len(problem.params), maximize=maximize
    )
    here = objective.evaluate()
    sign = -1.0 if maximize else 1.0
    pairs = zip(truth, problem.params, strict=True)
    whole = torch.cat([(sign * g + decay * p).view(-1) for g, p in pairs])
    torch.testing.assert_close(here.gradient, whole.detach(), rtol=1e-12, atol=1e-14)
    for g, expected in zip(here.hand_over_gradients(), truth, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match=r"handed over to \.grad"):
        _ = here.gradient
    with pytest.raises(RuntimeError, match=r"handed over to \.grad"):
        here.hand_over_gradients()
    assert not [v for v in vars(here).values() if isinstance(v, torch.Tensor) and v.ndim]
    assert objective.trial_loss(here) == pytest.approx(here.loss, rel=1e-15)
