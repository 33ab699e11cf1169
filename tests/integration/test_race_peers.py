"""The race's dense optimizers of least squares against textbook forms; harder tasks; its clock."""

from __future__ import annotations

import itertools
import json
import math
import sys
from argparse import Namespace
from importlib import import_module

import pytest
import torch
from paths import ROOT
from torch import nn

from torch_hf.solver.broyden import scaling, update_inverse

EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")}
MODULES = [path.stem for path in (ROOT / "benchmarks" / "race").glob("*.py")]
DENSE = ["lm", "lm-geodesic", "engd", "spring", "ssbroyden"]
PHYSICS = ["allen-cahn", "helmholtz", "advection", "poisson5d", "heat", "heat-resampled"]


@pytest.fixture(scope="module")
def race():
    """The race's modules, found as ``benchmarks/race.py`` finds them; the path is put back."""
    pytest.importorskip("torchvision")
    pytest.importorskip("tqdm")
    before, names = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
    try:
        yield Namespace(**{name: import_module(f"benchmarks.race.{name}") for name in MODULES})
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - names:  # the examples' `common` is not the benchmarks'
            if name.startswith("benchmarks") or name in EXAMPLES:
                del sys.modules[name]


def tiny(race, outputs=1, draw=None):
    """12 cases, a 2-4 network: more parameters than residuals where there is one output."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 2, generator=generator, dtype=torch.float64)
    y = torch.sin(3 * x[:, :1] + torch.arange(outputs)) + x[:, 1:].square()

    def make():
        layers = nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)
        return nn.Sequential(*layers).double()

    return race.task.supervised(
        *("tiny", "tiny", make, (x, y), (x, y)), nn.functional.mse_loss, {}, draw=draw
    )


def tiny_problem(race, outputs=1):
    torch.manual_seed(0)
    task = tiny(race, outputs)
    return race.flat.FlatProblem(task, task.make_model(), 0)


def dense(problem):
    """``r`` and J by torch.func, without anything of ours."""
    x, y = problem.task.train
    names = [name for name, _ in problem.model.named_parameters()]

    def residual(point):
        parts = point.split(problem.sizes)
        shaped = {n: v.view_as(p) for n, v, p in zip(names, parts, problem.params, strict=True)}
        z = torch.func.functional_call(problem.model, shaped, (x,)) - y
        return z.reshape(-1) * math.sqrt(2 / z.numel())

    here = problem.position()
    return residual, residual(here), torch.func.jacrev(residual)(here)


# --- a task as functions of a vector ---


@pytest.mark.parametrize("outputs", [1, 3])
def test_loss_gradient_residual_and_jacobian_agree(race, outputs):
    problem = tiny_problem(race, outputs)
    here = problem.position()
    _, r, jacobian = dense(problem)
    at = problem.linearize(here)
    torch.testing.assert_close(at.residual, r)
    torch.testing.assert_close(problem.residual(here), r)
    torch.testing.assert_close(at.jacobian, jacobian)
    loss, slope = problem.gradient(here)
    torch.testing.assert_close(slope, jacobian.T @ r)
    assert problem.loss(here) == loss == pytest.approx(at.loss) == pytest.approx(0.5 * float(r @ r))


SMALL = ["regression", "poisson", "burgers", "adding", "neural-ode", "lstm"]


@pytest.mark.parametrize("name", [*SMALL, *PHYSICS[:-2]])
def test_residuals_of_a_task_are_its_loss(race, name):
    task = race.tasks.TASKS[name](race.task.Setting())
    if name == "poisson5d":
        assert sum(p.numel() for p in task.make_model().parameters()) > 10_000
    model = task.make_model()
    squares = sum(r.square().mean() for r in task.residuals(model, task.train))
    torch.testing.assert_close(task.loss(model, task.train)[0], squares)


def test_a_loss_that_is_no_number_is_infinite(race):
    problem = tiny_problem(race)
    nowhere = problem.position() * math.nan
    assert problem.loss(nowhere) == problem.gradient(nowhere)[0] == math.inf


def test_a_task_of_another_kind_is_refused(race):
    task = tiny(race)
    task.residuals = None
    with pytest.raises(
        ValueError, match="must be one of least squares on the full batch, got tiny"
    ):
        race.flat.FlatProblem(task, task.make_model(), 0)


# --- Levenberg-Marquardt ---


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_levenberg_marquardt_takes_the_dense_step(race, outputs, scaled):
    problem = tiny_problem(race, outputs)
    _, r, jacobian = dense(problem)
    here, norms = problem.position(), jacobian.norm(dim=0)
    method = race.gauss_newton.LevenbergMarquardt(problem, damping=0.1, scaled=scaled)
    metric = torch.diag(norms**2) if scaled else norms.max() ** 2 * torch.eye(len(here)).double()
    wanted = -torch.linalg.solve(jacobian.T @ jacobian + 0.1 * metric, jacobian.T @ r)
    method.step()
    torch.testing.assert_close(problem.position() - here, wanted)
    assert method.trials == 1


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "nielsen"},
        {"rule": "tenfold"},
        {"rule": "nielsen", "scaled": True},
        {"rule": "delayed", "geodesic": True},
        {"rule": "delayed", "geodesic": True, "scaled": True},
    ],
    ids=str,
)
def test_levenberg_marquardt_ends_where_scipy_ends(race, options):
    """Ratkowsky's model has one minimum near; start and data are ours."""
    optimize = pytest.importorskip("scipy.optimize")
    problem, x, y = curve(race)
    found = optimize.least_squares(
        lambda b: logistic(torch.from_numpy(b), x).numpy() - y.numpy(),
        [1, 1, 1],
        method="lm",
        xtol=1e-15,
        ftol=1e-15,
    )
    method = race.gauss_newton.LevenbergMarquardt(problem, **options)
    for _ in range(60):
        method.step()
    torch.testing.assert_close(problem.position(), torch.from_numpy(found.x), rtol=1e-7, atol=0)


def logistic(b, x):
    return b[0] / (1 + torch.exp(b[1] - b[2] * x))


def curve(race):
    x = torch.linspace(0, 4, 9, dtype=torch.float64)
    noise = 0.02 * torch.cos(7 * x)
    y = logistic(torch.tensor([2.0, 3.0, 2.0]).double(), x) + noise
    start = torch.ones(3, dtype=torch.float64)
    regression = race.nist.Regression("own", logistic, x, y, (start, start), start, 0.0)
    task = race.nist_fits.Counted(regression, 1).task
    return race.flat.FlatProblem(task, task.make_model(), 0), x, y


def test_nielsens_rule(race):
    """Madsen, Nielsen & Tingleff, algorithm 3.16: down by 1/3 at most, up by 2, 4, 8, ..."""
    method = race.gauss_newton.LevenbergMarquardt(tiny_problem(race))
    for ratio, factor in ((1.0, 1 / 3), (0.5, 1.0), (0.25, 1.125), (1e9, 1 / 3)):
        method.damping = 1.0
        method._lower(ratio)
        assert method.damping == pytest.approx(factor)
    method.damping = 1.0
    seen = []
    for _ in range(3):
        method._raise()
        seen.append(method.damping)
    assert seen == [2.0, 8.0, 64.0]


def test_a_step_that_finds_nothing_leaves_the_point(race):
    problem = tiny_problem(race)
    here = problem.position()
    method = race.gauss_newton.LevenbergMarquardt(problem)
    problem.loss = lambda point: math.inf
    method.step()
    assert torch.equal(problem.position(), here)


def test_geodesic_acceleration_is_half_the_second_derivative(race):
    """Against the second directional derivative by torch.func."""
    problem = tiny_problem(race)
    residual, r, jacobian = dense(problem)
    here = problem.position()
    method = race.gauss_newton.LevenbergMarquardt(problem, damping=1.0, geodesic=True)
    method.step()
    matrix = jacobian.T @ jacobian + jacobian.norm(dim=0).max() ** 2 * torch.eye(len(here)).double()
    first = -torch.linalg.solve(matrix, jacobian.T @ r)

    along = torch.func.jacrev(torch.func.jacrev(lambda t: residual(here + t * first)))
    second = along(torch.zeros((), dtype=torch.float64))
    wanted = first - 0.5 * torch.linalg.solve(matrix, jacobian.T @ second)
    moved = problem.position() - here
    assert (moved - wanted).norm() < 0.05 * (wanted - first).norm()  # a difference of length 0.1


# --- natural gradient and SPRING ---


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_natural_gradient_minimises_its_quadratic(race, outputs, momentum):
    """``|J d + r|^2 + lambda |d - momentum d_last|^2`` over two steps, by dense algebra."""
    problem = tiny_problem(race, outputs)
    method = race.gauss_newton.NaturalGradient(problem, damping=1e-2, momentum=momentum)
    last = torch.zeros_like(problem.position())
    for _ in range(2):
        _, r, jacobian = dense(problem)
        here = problem.position()
        matrix = jacobian.T @ jacobian + 1e-2 * torch.eye(len(here)).double()
        move = torch.linalg.solve(matrix, 1e-2 * momentum * last - jacobian.T @ r)
        losses = {2.0**-k: problem.loss(here + 2.0**-k * move) for k in range(31)}
        problem.move_to(here)
        method.step()
        length = min(losses, key=losses.get)
        torch.testing.assert_close(problem.position(), here + length * move)
        last = move


# --- self-scaled Broyden ---


def direct_form(hessian, step, change, update):
    """Broyden's family for B itself (Al-Baali 1998), theta and tau of Urbán et al. (2024)."""
    size = len(step)
    moved = hessian @ step
    along = change @ step
    b = step @ moved / along
    h = change @ torch.linalg.solve(hessian, change) / along
    a = b * h - 1
    low = min(1.0, h * (1 - (a / (1 + a)) ** 0.5))
    theta = max((low - 1) / a, min(1 / low, (1 - b) / b))
    sigma = 1 + a * theta
    first = min(1.0, 1 / b)
    if theta > 0:
        tau = first * min(sigma ** (-1 / (size - 1)), 1 / theta)
    else:
        tau = min(first * sigma ** (-1 / (size - 1)), sigma)
    if update == "ssbfgs":
        theta, tau = 0.0, first
    elif update == "bfgs":
        theta, tau = 0.0, 1.0
    w = (step @ moved).sqrt() * (change / along - moved / (step @ moved))
    inner = hessian - torch.outer(moved, moved) / (step @ moved) + theta * torch.outer(w, w)
    return tau * inner + torch.outer(change, change) / along


@pytest.mark.parametrize("update", ["bfgs", "ssbfgs", "ssbroyden"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [2, 7])
def test_update_is_the_papers_and_meets_the_secant_equation(update, seed, size):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + 0.1 * torch.eye(size).double()
    step, change = torch.randn(2, size, generator=generator, dtype=torch.float64)
    if step @ change < 0:
        change = -change
    change = change * 10.0 ** (seed - 2)  # curvature that grows and that falls
    inverse = torch.linalg.inv(hessian)
    update_inverse(inverse, step, change, float(step @ hessian @ step), update)
    torch.testing.assert_close(inverse @ change, step)
    wanted = torch.linalg.inv(direct_form(hessian, step, change, update))
    torch.testing.assert_close(inverse, wanted, rtol=1e-6, atol=1e-9)
    assert torch.linalg.eigvalsh(inverse).min() > 0


def test_all_cases_of_the_scaling_occur():
    thetas = [scaling(b, h, 7, "ssbroyden")[1] for b, h in ((0.5, 3), (3, 2), (2, 0.6))]
    assert thetas[0] < 1 < thetas[1]  # theta positive, then negative


@pytest.mark.parametrize("update", ["ssbroyden", "ssbfgs", "bfgs"])
def test_broyden_keeps_what_it_may_and_falls_throughout(race, update):
    problem = tiny_problem(race)
    method = race.broyden.SelfScaledBroyden(problem, update=update)
    losses = [problem.loss(problem.position())]
    for _ in range(40):
        method.step()
        losses.append(method.loss)
        assert torch.equal(problem.position(), method.here)
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.2 * losses[0]


# --- as contenders ---


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_peer_lowers_the_loss_with_every_variant(race, name):
    spec = race.peers.PEERS[name]
    for variant in spec.variants:
        torch.manual_seed(0)
        task = tiny(race)
        model = task.make_model()
        before = task.evaluate(model, True)["train_loss"]
        rate = {spec.searched: spec.rates[0], **variant}
        contender, options = race.contenders.make_contender(name, task, model, 0, rate)
        for _ in range(25):
            contender.step(0.0)
        assert task.evaluate(model, True)["train_loss"] < 0.3 * before, variant
        assert options == rate


def test_dense_peers_stay_out_of_minibatches_and_their_damping_can_be_given(race):
    assert set(race.cli.ON_FULL_BATCH_ALONE) == {*DENSE, "adam-lbfgs"}
    names = {"lm:damping=0.1": "lm", "lm:lr=1": "lm", "adam:lr=0.1": "adam", "engd": "engd"}
    assert race.cli._searched(names) == ["lm", "engd"]


def test_a_damping_is_searched_by_factors_of_thirty(race, monkeypatch):
    def fake(task, name, seed, budget, rate, **options):
        return {"curve": {"train_loss": [abs(math.log10(rate["damping"]) + 1.5) / 100]}}

    monkeypatch.setattr(race.rates, "run", fake)
    task = tiny(race)
    monkeypatch.setattr(task, "evaluate", lambda model, whole: {"train_loss": 1.0})
    found = race.rates.search(task, "engd", 1.0, race.task.Setting(), lambda line: None)
    assert found["options"] == {"damping": pytest.approx(10**-1.5, rel=0.01)}


@pytest.mark.parametrize(("name", "trials"), [("adam", 7), ("lm", 15), ("ssbroyden", 2)])
def test_a_search_is_planned_by_its_trials(race, name, trials):
    """Each peer's, in units of the usual one of seven trials and two of three times the length."""
    assert race.schedule.search_length(race.peers.PEERS[name]) == (trials + 6) / 13


def test_every_step_of_everybody_sees_the_same_new_points(race):
    seen = {}
    for name in ("hf", "adam", "lbfgs", *DENSE):
        generator_task = tiny(race)
        x, y = generator_task.train
        drawn = []

        def draw(source, drawn=drawn, x=x, y=y):
            drawn.append(torch.rand(x.shape, generator=source, dtype=x.dtype))
            return drawn[-1], y

        task = tiny(race, draw=draw)
        used, loss = [], task.loss
        task.loss = lambda model, batch, used=used, loss=loss: (
            used.append(batch[0]),
            loss(model, batch),
        )[1]
        options = {"lr": 0.1} if name == "adam" else {}
        contender, _ = race.contenders.make_contender(name, task, task.make_model(), 5, options)
        for i in range(3):
            used.clear()
            contender.step(0.0)
            assert len(drawn) == i + 1 and all(points is drawn[-1] for points in used), name
            assert used or name in DENSE
        seen[name] = torch.stack(drawn)
    assert all(torch.equal(points, seen["hf"]) for points in seen.values())
    assert not torch.equal(*seen["hf"][:2])


# --- tasks ---


class Exact(nn.Module):
    """A solution in the network's place."""

    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def forward(self, points):
        return self.compute(points)


def sines(p):
    return torch.sin(math.pi * p).sum(dim=1, keepdim=True)


SOLUTIONS = {
    "helmholtz": lambda p: torch.sin(math.pi * p[:, :1]) * torch.sin(4 * math.pi * p[:, 1:]),
    "advection": lambda p: torch.sin(p[:, 1:] - 30 * p[:, :1]),
    "poisson5d": sines,
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_solution_has_no_loss(race, name):
    task = race.tasks.TASKS[name](race.task.Setting())
    loss, _ = task.loss(Exact(SOLUTIONS[name]), task.train)
    assert float(loss.detach()) < 1e-20
    assert task.evaluate(Exact(SOLUTIONS[name]), True)["test_error"] < 1e-12


@pytest.mark.parametrize("name", ["heat", "heat-resampled"])
def test_the_true_temperature_leaves_only_the_noise(race, name):
    task = race.tasks.TASKS[name](race.task.Setting())
    model = task.make_model()
    model.temperature = Exact(race.inverse.temperature)
    with torch.no_grad():
        model.coefficient.fill_(race.inverse.COEFFICIENT)
    inside, edges, readings = task.residuals(model, task.train)
    assert inside.abs().max() < 1e-10 and edges.abs().max() < 1e-12
    assert float(readings.std()) == pytest.approx(race.inverse.NOISE, rel=0.3)
    assert task.evaluate(model, True)["coefficient_error"] < 1e-12
    again = task.whole(torch.Generator().manual_seed(0))[0]
    assert torch.equal(again, task.train[0]) == (name == "heat")


def test_allen_cahn_reference(race):
    """Right to 1e-6 against twice the resolution, from the start that the loss asks for."""
    times, places, values = race.equations.allen_cahn_solution(512, 500)
    finer = race.equations.allen_cahn_solution(1024, 1000)[2]
    torch.testing.assert_close(values, finer, atol=2e-6, rtol=0)
    torch.testing.assert_close(values[0], places.square() * torch.cos(math.pi * places))
    assert (values[:, [0, -1]] == -1).all()
    # the equation itself by differences, where the solution is smooth
    dt, dx = float(times[1]), float(places[1] - places[0])
    u = finer[2:5]
    u_t = (u[2] - u[0]) / (2 * dt)
    u_xx = (u[1].roll(1) - 2 * u[1] + u[1].roll(-1)) / dx**2
    residual = (u_t - race.equations.DIFFUSION * u_xx - 5 * u[1] + 5 * u[1] ** 3)[2:-2]
    assert residual.abs().max() < 0.01 * u_t.abs().max()


def test_allen_cahns_network_is_measured_against_the_reference(race):
    task = race.tasks.TASKS["allen-cahn"](race.task.Setting())
    values = race.equations.allen_cahn_solution()[2].reshape(-1, 1)
    other = Exact(lambda p: values if len(p) == len(values) else p.pow(3).sum(dim=1, keepdim=True))
    assert task.evaluate(other, True)["test_error"] == 0.0
    zero = Exact(lambda p: 0 * p.pow(3).sum(dim=1, keepdim=True))
    assert task.evaluate(zero, True)["test_error"] == pytest.approx(1.0)


# --- NIST's regressions ---


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def danwood(race):
    """NIST's DanWood, whole: two parameters and six values."""
    return race.nist.Regression(
        "DanWood",
        race.nist.MODELS["DanWood"],
        double(1.309, 1.471, 1.490, 1.565, 1.611, 1.680),
        double(2.138, 3.421, 3.597, 4.340, 4.882, 5.660),
        (double(1.0, 5.0), double(0.7, 4.0)),
        double(7.6886226176e-01, 3.8604055871),
        4.3173084083e-03,
    )


@pytest.mark.parametrize("name", ["hf", "lm", "lm:scaled=True", "ssbroyden", "lbfgs"])
def test_a_fit_is_counted_until_six_digits(race, danwood, name):
    found = race.nist_fits.fit(danwood, 2, name, max_calls=500)
    assert found.error is None and found.digits >= 6
    assert 3 < found.calls <= found.spent < 500
    assert danwood.starts[1].tolist() == pytest.approx([0.7, 4.0])  # not moved


def test_every_evaluation_is_a_call(race, danwood):
    counted = race.nist_fits.Counted(danwood, 1)
    model = counted.task.make_model()
    method = race.gauss_newton.LevenbergMarquardt(race.flat.FlatProblem(counted.task, model, 0))
    method.step()
    assert counted.calls == 1 + method.trials and counted.reached is None
    with torch.no_grad():
        model.b.copy_(danwood.certified)
    counted.task.loss(model, counted.task.train)
    assert counted.reached == counted.calls == 2 + method.trials


def test_a_table_of_fits(race):
    make = race.nist_fits.Fit
    fits = [
        *(make("A", 1, "lm", 8.0, 10, 40), make("A", 1, "hf", 7.0, 30, 60)),
        *(make("B", 1, "lm", 9.0, 20, 50), make("B", 1, "hf", 2.0, None, 99)),
        *(make("C", 1, "lm", 1.0, None, 50), make("C", 1, "hf", 6.5, 40, 70)),
    ]
    text = race.nist_fits.table(fits).splitlines()
    assert text[0] == "| problem, start | lm | hf |"
    assert text[3] == "| B, 1 | 9.0, 20 | 2.0, – |"
    assert text[5] == "| **six digits** | 2 of 3 | 2 of 3 |"
    assert text[6] == "| **median calls** | 20 | 40 |"
    assert text[7] == "| **median of calls over lm's** | 1 | – |"


def test_without_data_there_is_no_table(race, tmp_path, capsys):
    with pytest.raises(SystemExit):
        race.nist_fits.main(["--data-root", str(tmp_path)])
    assert "put the 27 .dat files" in capsys.readouterr().err


# --- clock, turns and marks ---


def test_cpu_seconds_are_counted(race, monkeypatch):
    clock = itertools.count()
    fake = Namespace(process_time=lambda: 0.5 * next(clock), perf_counter=lambda: math.nan)
    monkeypatch.setattr(race.runner, "time", fake)
    result = race.runner.run(tiny(race), "lm", 0, 3.0, clock="cpu")
    assert result["curve"]["seconds"][-1] <= 3.0 and result["curve"]["steps"][-1] >= 5


def test_the_command_line_counts_cpu_seconds(race, tmp_path, monkeypatch, capsys):
    asked = []

    def fake(task, name, seed, budget, **options):
        asked.append(options["clock"])
        curve = {"seconds": [budget], "steps": [1], "train_loss": [1.0], "test_error": [1.0]}
        return {"optimizer": name, "seed": seed, "budget": budget, "curve": curve}

    monkeypatch.setattr(race.cli, "run", fake)
    monkeypatch.setattr(race.cli, "warm_up", lambda *args, **options: None)
    monkeypatch.setattr(race.cli, "plot", lambda *args: None)
    common = ["--tasks", "regression", "--optimizers", "hf", "--clock", "cpu", "--seeds", "1"]
    race.cli.main([*common, "--budget", "4", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "race-regression-cpu-seconds.json").read_text())
    assert asked == ["cpu"] and content["sessions"][0]["threads"] == 1
    assert content["task"]["clock"] == content["sessions"][0]["clock"] == "cpu"
    assert "medians at 4 CPU s" in capsys.readouterr().out
    record = race.record.Record(tmp_path / "race-regression-cpu-seconds.json")
    assert "1 thread, CPU seconds" in race.report.measured(record)
    with pytest.raises(SystemExit):
        race.cli.main([*common, "--device", "cuda"])
    assert "does not see what cuda does" in capsys.readouterr().err


def test_turns_give_the_same_runs(race, monkeypatch):
    """Of optimizers that draw random numbers too: a run held and resumed is the run in one go."""
    clock = itertools.count()
    monkeypatch.setattr(race.runner, "time", Namespace(perf_counter=lambda: 0.25 * next(clock)))
    rate = {"lr": 0.1}

    class Noisy:
        def __init__(self, *args):
            self.model = args[2]

        def step(self, progress):
            order.append(self.name)
            with torch.no_grad():
                for p in self.model.parameters():
                    p.add_(0.01 * torch.randn_like(p))

        def notes(self):
            return {}

    order = []

    def make(name, *args):
        contender = Noisy(name, *args)
        contender.name = name
        return contender, {}

    monkeypatch.setattr(race.runner, "make_contender", make)
    alone = [race.runner.run(tiny(race), name, 3, 4.0, rate=rate) for name in ("a", "b")]
    order.clear()
    held = [race.runner.Training(tiny(race), name, 3, 4.0, rate=rate) for name in ("a", "b")]
    race.runner.take_turns(held, 0.5)
    assert [training.result for training in held] == alone
    assert order[:8] == ["a", "a", "b", "b", "a", "a", "b", "b"]


def test_marks_at_a_tenth_and_a_third(race, tmp_path):
    record = race.record.Record(tmp_path / "race.json")
    record.about = {"title": "t", "train_metric": "loss", "test_metric": "error"}
    curve = {
        "seconds": [0.0, 3.0, 10.0, 30.0],
        "loss": [10.0, 4.0, 2.0, 1.0],
        "error": [0.9, 0.5, 0.3, 0.2],
        "steps": [0, 1, 2, 3],
    }
    record.runs = [{"optimizer": "hf", "seed": 0, "budget": 30.0, "curve": curve}]
    (row,) = race.record.summary(record)
    assert row["at"]["1/10"] == {"loss": pytest.approx(4.0), "error": pytest.approx(0.5)}
    assert row["at"]["1/3"] == {"loss": pytest.approx(2.0), "error": pytest.approx(0.3)}
    header, rows = race.report.table(record)
    found = dict(zip(header, rows[0], strict=True))
    assert found["loss at 1/10"] == "4" and found["error at 1/3"] == "0.3" and found["loss"] == "1"


def test_the_curve_is_measured_at_the_marks(race, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(race.runner, "time", Namespace(perf_counter=lambda: 0.01 * next(clock)))
    result = race.runner.run(tiny(race), "lm", 0, 3.0, points=2)
    seconds = result["curve"]["seconds"]
    assert seconds[:3] == pytest.approx([0.0, 0.03, 0.3], abs=0.011)
    assert seconds[3] == pytest.approx(1.0, abs=0.011)
