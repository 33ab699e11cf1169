"""The race's parts: its data against what they claim to be, the harness on the smallest task."""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from argparse import Namespace
from importlib import import_module

import pytest
import torch
from paths import ROOT

from torch_hf.curvature import GaussNewtonOperator

EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")}
MODULES = [path.stem for path in (ROOT / "benchmarks" / "race").glob("*.py")]


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


# --- data ---


def test_curves_are_curves(race):
    images = race.images.curves(50)
    assert images.shape == (50, 784)
    assert images.min() >= 0 and images.max() <= 1
    assert images[images > 0].min() > 1e-3  # subnormal numbers would be slow
    ink = images.sum(dim=1)
    assert ink.min() > 10 and ink.max() < 250  # neither blank nor a blot
    assert images.amax(dim=1).min() > 0.8
    assert torch.equal(images, race.images.curves(50))


def test_spline_is_natural_and_passes_through_its_points(race):
    points = torch.rand(4, 3, 2, dtype=torch.float64)
    times = torch.linspace(0, 1, 2001, dtype=torch.float64)
    path = race.images.spline(points, times)
    torch.testing.assert_close(path[:, [0, 1000, 2000]], points)
    bend = path.diff(dim=1).diff(dim=1) * 2000**2
    scale = bend.abs().amax(dim=1)
    assert (bend[:, 0].abs() < 0.01 * scale).all() and (bend[:, -1].abs() < 0.01 * scale).all()
    assert (bend.diff(dim=1).abs().amax(dim=1) < 0.01 * scale).all()  # continuous at the middle


def test_adding_problem(race):
    sequences, sums = race.small.adding_data(500, 31, seed=3)
    numbers, marks = sequences.unbind(dim=2)
    assert ((numbers >= 0) & (numbers <= 1)).all()
    assert torch.equal(marks[:, :15].sum(dim=1), torch.ones(500))
    assert torch.equal(marks[:, 15:].sum(dim=1), torch.ones(500))
    torch.testing.assert_close(sums[:, 0], (numbers * marks).sum(dim=1))
    assert float(sums.var()) == pytest.approx(1 / 6, rel=0.2)


def test_trajectories_of_predators_and_prey_keep_their_first_integral(race):
    start, points = race.sequences.flow_data(20, 30, seed=3)
    path = torch.cat([start[:, None], points.unflatten(1, (30, 2))], dim=1)
    prey, predators = path.unbind(dim=2)
    kept = prey - prey.log() + predators - 1.1 * predators.log()
    torch.testing.assert_close(kept, kept[:, :1].expand_as(kept), rtol=1e-5, atol=1e-5)
    assert ((path[:, -1] - path[:, 0]).norm(dim=1) > 0.1).any()
    model = race.sequences.neural_ode(race.task.Setting()).make_model()
    assert sum(p.numel() for p in model.parameters()) == 522


def test_waves_are_to_be_predicted_one_value_ahead(race):
    values, following = race.sequences.wave_data(20, seed=3)
    assert values.shape == following.shape == (20, 59)
    assert torch.equal(values[:, 1:], following[:, :-1])
    assert (values.abs() <= 1.5).all() and values.std(dim=1).min() > 0.3
    model = race.sequences.Predictor(3)
    outputs = model(values)
    assert outputs.shape == following.shape
    changed = values.clone()
    changed[:, 30:] += 1.0  # what comes later must not be seen
    torch.testing.assert_close(model(changed)[:, :30], outputs[:, :30])


def test_structural_damping_adds_the_hidden_states_gauss_newton_matrix(race):
    """Against dense Jacobians: loss and gradient stay, G gains mu J_h^T J_h, a mean over cases."""
    torch.manual_seed(0)
    model = race.small.Recurrent(2, 3).double()
    batch = tuple(tensor.double() for tensor in race.small.adding_data(4, 5, seed=0))
    params, mu = list(model.parameters()), 0.3
    plain = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    damped, _ = race.small.structurally_damped(model, batch, mu)
    assert plain.item() == damped.item()
    gradients = [torch.autograd.grad(loss, params) for loss in (plain, damped)]
    torch.testing.assert_close(*gradients)

    def jacobian(compute):  # (numbers, P), a row a number that the model computes
        rows = [
            torch.autograd.grad(y, params, retain_graph=True, materialize_grads=True)
            for y in compute().flatten()
        ]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    outputs = jacobian(lambda: model(batch[0]))
    hidden = jacobian(lambda: torch.stack(model.states(batch[0])))
    dense = 2 / 4 * outputs.T @ outputs + mu / 4 * hidden.T @ hidden
    operator = GaussNewtonOperator.from_closure(
        lambda: race.small.structurally_damped(model, batch, mu), params
    )
    columns = [operator(e) for e in torch.eye(len(dense), dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns), dense)


def test_structural_damping_needs_hidden_states(race):
    task = race.tasks.TASKS["regression"](race.task.Setting())
    with pytest.raises(ValueError, match="no hidden states"):
        race.contenders.make_contender("hf:structural=0.1", task, task.make_model(), 0, {})


def test_cole_hopf_solves_burgers_equation(race):
    x = torch.linspace(-0.9, 0.9, 19).double()
    t = torch.full_like(x, 0.2)  # before the front steepens, where differences are accurate
    h, viscosity = 1e-3, race.physics.VISCOSITY

    def u(dt=0.0, dx=0.0):
        return race.physics.cole_hopf(t + dt, x + dx)

    u_t, u_x = ((u(**{k: h}) - u(**{k: -h})) / (2 * h) for k in ("dt", "dx"))
    u_xx = (u(dx=h) - 2 * u() + u(dx=-h)) / h**2
    residual = u_t + u() * u_x - viscosity * u_xx
    assert residual.abs().max() < 1e-3 * u_t.abs().max()


def test_cole_hopf_start_ends_and_front(race):
    x = torch.linspace(-1, 1, 21).double()
    start = race.physics.cole_hopf(torch.zeros_like(x), x)
    torch.testing.assert_close(start, -torch.sin(math.pi * x), atol=1e-12, rtol=0)
    ends = race.physics.cole_hopf(
        torch.full((2,), 0.7).double(), torch.tensor([-1.0, 1.0]).double()
    )
    assert ends.abs().max() < 1e-10
    t = torch.full((3,), 0.5).double()
    near = race.physics.cole_hopf(t, torch.tensor([-0.05, 0.0, 0.05]).double())
    assert near[0] > 0.8 and abs(near[1]) < 1e-10 and near[2] < -0.8
    coarse, fine = (race.physics.cole_hopf(x.abs(), x, nodes=n) for n in (120, 200))
    torch.testing.assert_close(coarse, fine, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["poisson", "burgers"])
def test_the_exact_solution_has_no_loss(race, name, monkeypatch):
    """With the solution in the network's place the loss is zero: residual and boundary agree."""
    task = getattr(race.physics, name)(race.task.Setting())

    class Exact(torch.nn.Module):
        def forward(self, p):
            if name == "poisson":
                return torch.sin(math.pi * p[:, :1]) * torch.sin(math.pi * p[:, 1:])
            return race.physics.cole_hopf(p[:, 0].clamp_min(1e-9), p[:, 1])[:, None]

    early = task.train[0][task.train[0][:, 0] < 0.25] if name == "burgers" else task.train[0]
    loss, _ = task.loss(Exact(), (early,))
    assert float(loss.detach()) < 1e-5
    assert task.evaluate(Exact(), True)["test_error"] < 1e-6


def test_mel_bank_and_context(race):
    bank = race.speech.mel_bank()
    assert bank.shape == (24, 129) and (bank.sum(dim=1) > 0).all()
    centres = bank.argmax(dim=1)
    assert (centres.diff() >= 1).all()
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(4000) / 8000)
    frames = race.speech.features(tone, bank)
    torch.testing.assert_close(frames.mean(dim=0), torch.zeros(24), atol=1e-4, rtol=0)
    wide = race.speech.with_context(frames)
    assert wide.shape == (len(frames), 216)
    torch.testing.assert_close(wide[5].view(9, 24), frames[1:10])
    torch.testing.assert_close(wide[0].view(9, 24)[:5], frames[:1].expand(5, 24))


def test_without_data_a_task_is_left_out(race, tmp_path, capsys):
    race.cli.main(["--tasks", "speech", "mnist", "--data-root", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "speech: left out" in printed and "mnist: left out" in printed


# --- harness ---


def arguments(tmp_path, *more):
    common = ["--tasks", "regression", "--threads", "1", "--seeds", "1", "--output", str(tmp_path)]
    return [*common, "--rates", str(tmp_path / "rates.json"), "--search-budget", "0.02", *more]


def test_race_leaves_record_table_and_plot(race, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    clock = itertools.count()  # each step takes 0.02 s, on a busy machine too
    monkeypatch.setattr(race.runner, "time", Namespace(perf_counter=lambda: 0.02 * next(clock)))
    more = ["--optimizers", "hf", "adam", "--budget", "0.5"]
    race.cli.main(arguments(tmp_path, *more))
    path = tmp_path / "race-regression-cpu.json"
    content = json.loads(path.read_text())
    assert [run["optimizer"] for run in content["runs"]] == ["hf", "adam"]
    for run in content["runs"]:
        curve = run["curve"]
        assert curve["seconds"] == sorted(curve["seconds"]) and len(curve["seconds"]) > 3
        assert curve["train_loss"][-1] < curve["train_loss"][0]
    assert content["sessions"][0]["threads"] == 1 and content["sessions"][0]["torch"]
    assert str(tmp_path) not in path.read_text()  # nor any other folder of this machine
    assert "medians at 0.5 s" in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 1000
    race.cli.main(arguments(tmp_path, *more, "--resume", "--first-seed", "1"))
    assert len(json.loads(path.read_text())["runs"]) == 4
    capsys.readouterr()
    assert race.report.measured(race.record.Record(path)).count("race.py --tasks regression") == 2
    race.cli.main(arguments(tmp_path, "--report"))
    assert "| hf | 2 |" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("before\n" + "old".join(race.report.MARKS) + "\nafter\n")
    race.cli.main(arguments(tmp_path, "--report", "--into", str(page)))
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n")
    assert "| hf | 2 |" in text and "old" not in text


def test_a_race_leaves_the_record_alone_unless_told(race, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    record = tmp_path / "record"
    monkeypatch.setattr(race.cli, "RESULTS", record)
    short = ["--tasks", "regression", "--optimizers", "hf", "--seeds", "1", "--budget", "0.05"]
    race.cli.main([*short, "--threads", "1"])
    aside = tmp_path / "runs" / "bench" / "race-regression-cpu.json"
    assert aside.is_file() and not record.exists()
    race.cli.main([*short, "--threads", "1", "--record"])
    assert (record / aside.name).is_file()
    assert "--record" not in (record / aside.name).read_text()
    race.cli.main(["--tasks", "regression", "--output", str(aside.parent), "--csv", "tables"])
    header, *rows = (tmp_path / "tables" / "race-regression-cpu.csv").read_text().splitlines()
    assert header.startswith("optimizer,seed,budget,seconds,steps,train_loss")
    assert len(rows) == len(json.loads(aside.read_text())["runs"][0]["curve"]["seconds"])
    assert rows[0].startswith("hf,0,0.05,")


def test_rates_found_aside_leave_the_file_alone(race, tmp_path):
    known, aside = tmp_path / "known.json", tmp_path / "new" / "rates.json"
    setting = race.task.Setting()
    entry = {"options": {"lr": 0.1}, "seconds_each": 1.0}
    race.rates.Rates(known).put(setting, "regression", "adam", entry)
    before = known.read_bytes()
    both = race.rates.Rates(known, aside)
    both.put(setting, "regression", "sgd", entry | {"options": {"lr": 0.2}})
    again = race.rates.Rates(known, aside)
    assert again.get(setting, "regression", "adam", 1.0) == {"lr": 0.1}
    assert again.get(setting, "regression", "sgd", 1.0) == {"lr": 0.2}
    assert known.read_bytes() == before


def test_resume_adds_only_what_is_missing(race, tmp_path, monkeypatch):
    made = []

    def fake(task, name, seed, budget, **options):
        made.append((name, seed))
        curve = {"seconds": [budget], "steps": [1], "train_loss": [1.0], "test_error": [1.0]}
        return {"optimizer": name, "seed": seed, "budget": budget, "curve": curve}

    monkeypatch.setattr(race.cli, "run", fake)
    monkeypatch.setattr(race.cli, "warm_up", lambda *args, **options: None)
    monkeypatch.setattr(race.cli, "plot", lambda *args: None)
    ours = ["--optimizers", "hf", "hf-plain", "--resume"]
    race.cli.main(arguments(tmp_path, *ours))
    race.cli.main(arguments(tmp_path, *ours, "--seeds", "2"))
    assert made == [(name, seed) for seed in (0, 1) for name in ("hf", "hf-plain")]
    race.cli.main(arguments(tmp_path, *ours, "--hf", "cg_max_iter=5"))  # other options: a new name
    assert made[4:] == [("hf:cg_max_iter=5", 0), ("hf-plain:cg_max_iter=5", 0)]


@pytest.mark.parametrize("peer", ["lbfgs", "muon", "soap", "shampoo", "kron", "adahessian", "kfac"])
def test_every_peer_steps_or_says_why_not(race, peer):
    task = race.small.regression(race.task.Setting())
    model = task.make_model()
    before = [p.detach().clone() for p in model.parameters()]
    rate = {"lr": race.peers.PEERS[peer].rates[0], **race.peers.PEERS[peer].variants[0]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in a race
            contender, _ = race.contenders.make_contender(peer, task, model, 0, rate)
            for _ in range(3):  # some take their first step only to set up their state
                contender.step(0.0)
    except race.task.Missing as error:
        assert "pip install" in str(error)
        return
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_first_step_longer_than_the_budget_does_not_count(race):
    task = race.small.regression(race.task.Setting())
    result = race.runner.run(task, "lbfgs", 0, 1e-9)
    assert result["curve"]["steps"][-1] == 0 and result["curve"]["seconds"][-1] == 0.0


def test_a_long_step_beyond_the_budget_does_not_count(race):
    """Nothing tells of it in advance, so the last point on the curve stands."""
    task = race.small.regression(race.task.Setting())
    model, lengths = task.make_model(), iter([0.1, 0.1, 0.1, 5.0])

    class Slow:
        seconds = 0.0

        def time(self, contender, progress):
            with torch.no_grad():
                model[0].weight += 1.0
            passed = next(lengths)
            self.seconds += passed
            return passed

        def notes(self):
            return {}

    rows = []
    watch = Slow()
    list(race.runner._train(task, model, watch, watch, 1.0, 20, rows))
    assert rows[-1] == rows[-2]
    assert rows[-1]["steps"] == 3 and rows[-1]["seconds"] == pytest.approx(0.3)


def test_minutes_shorten_the_runs_until_all_fit(race, monkeypatch):
    """Budgets, searches and evaluations add up to four fifths of the minutes, never to more."""
    task = race.small.regression(race.task.Setting())
    clock = iter(range(0, 1000))  # each evaluation takes a second
    monkeypatch.setattr(race.schedule.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(race.schedule, "POINTS", 4)
    budget = race.schedule.fitting(task, "cpu", runs=6, searches=2, minutes=5)
    # 240 s less 6 runs' 5 evaluations, over 6 runs and 2 searches of 13 sixths of a run
    assert budget == math.floor((240 - 6 * 5) / (6 + 2 * 13 / 6))
    with pytest.raises(ValueError, match=r"60 runs .* do not fit in 5 minutes"):
        race.schedule.fitting(task, "cpu", runs=60, searches=0, minutes=5)


def test_minutes_on_the_command_line(race, tmp_path, capsys, monkeypatch):
    """A rate by hand needs no search; a task's own budget is not exceeded."""
    asked = []
    monkeypatch.setattr(race.cli, "fitting", lambda task, *rest: asked.append(rest) or 1e9)
    monkeypatch.setattr(race.cli, "run", lambda task, name, seed, budget, **_: asked.append(budget))
    monkeypatch.setattr(race.cli.Record, "add", lambda *_: None)
    monkeypatch.setattr(race.cli, "_line", lambda *_: "")
    monkeypatch.setattr(race.cli, "warm_up", lambda *_, **__: None)
    race.cli.main(arguments(tmp_path, "--optimizers", "hf", "adam:lr=0.1", "--minutes", "10"))
    assert asked[0] == ("cpu", 2, 0, 10.0) and asked[1:] == [15.0, 15.0]
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"regression: 2 runs .* give more minutes"):
        race.cli.main(arguments(tmp_path, "--optimizers", "hf", "adam:lr=0.1", "--minutes", "0.01"))


def test_the_best_on_a_curve_and_the_last(race):
    curve = {"test_error": [0.9, 0.5, None, 0.7]}
    assert race.record.final({"curve": curve}, "test_error") == 0.7
    assert race.record.best({"curve": curve}, "test_error") == 0.5
    assert race.record.best({"curve": curve, "error": "no"}, "test_error") is None


def test_adam_hands_over_to_lbfgs_and_cosine_ends_at_zero(race):
    task = race.small.regression(race.task.Setting())
    for name in ("adam-lbfgs", "adam-cosine"):
        model = task.make_model()
        peer, _ = race.contenders.make_contender(name, task, model, 0, {"lr": 1e-3})
        peer.step(0.1)
        peer.step(1.0)
        (optimizer,) = peer.optimizers
        if name == "adam-lbfgs":
            assert isinstance(optimizer, torch.optim.LBFGS)
        else:
            assert optimizer.param_groups[0]["lr"] == 0.0


def fake_search(race, monkeypatch, loss):
    """A search in which the rate and the seconds decide the loss; 1 is the untrained network's."""

    def fake(task, name, seed, budget, rate, **options):
        return {"curve": {"train_loss": [loss(math.log10(rate["lr"]), budget)]}}

    monkeypatch.setattr(race.rates, "run", fake)
    task = race.small.regression(race.task.Setting())
    monkeypatch.setattr(task, "evaluate", lambda model, whole: {"train_loss": 1.0})
    return race.rates.search(task, "adam", 1.0, race.task.Setting(), lambda line: None)


def test_search_goes_on_beyond_an_end_that_wins(race, monkeypatch):
    found = fake_search(race, monkeypatch, lambda lr, seconds: abs(lr + 5) / 10)
    assert found["options"]["lr"] == pytest.approx(1e-5, rel=0.1)
    assert len(found["tried"]) == 4 + 4 + 2


def test_search_goes_down_where_all_diverge(race, monkeypatch):
    found = fake_search(race, monkeypatch, lambda lr, seconds: 1e9 if lr > -4.2 else 0.5)
    assert found["options"]["lr"] < 10**-4.2


def test_search_goes_down_where_the_lowest_diverged(race, monkeypatch):
    """A rate between that did not is no reason to stay: 1e-2 ends a little below the start."""

    def loss(lr, seconds):
        return 0.99 if abs(lr + 2) < 0.1 else 1e9 if lr > -3.2 else 0.5

    found = fake_search(race, monkeypatch, loss)
    assert found["options"]["lr"] < 10**-3.2


def test_a_longer_final_decides(race, monkeypatch):
    short, long = (lambda lr: abs(lr + 2.5)), (lambda lr: abs(lr + 3))
    found = fake_search(race, monkeypatch, lambda lr, s: 0.1 * (short if s == 1 else long)(lr))
    assert found["options"]["lr"] == pytest.approx(1e-3, rel=0.1) or found["options"]["lr"] == 3e-3
    assert [entry["seconds"] for entry in found["tried"]][-2:] == [3.0, 3.0]


def test_rates_of_two_searches_are_kept_and_short_ones_not_taken(race, tmp_path):
    setting, path = race.task.Setting(), tmp_path / "rates.json"
    one, two = race.rates.Rates(path), race.rates.Rates(path)
    one.put(setting, "mnist", "adam", {"options": {"lr": 1.0}, "seconds_each": 2.0})
    two.put(setting, "mnist", "sgd", {"options": {"lr": 2.0}, "seconds_each": 2.0})
    found = race.rates.Rates(path)
    assert found.get(setting, "mnist", "adam", 3.0) == {"lr": 1.0}
    assert found.get(setting, "mnist", "sgd", 3.0) == {"lr": 2.0}
    assert found.get(setting, "mnist", "adam", 5.0) is None
    assert found.get(race.task.Setting(large=True), "mnist", "adam", 1.0) is None


def test_a_peer_that_cannot_run_is_not_searched_for_long(race, monkeypatch):
    task = race.small.regression(race.task.Setting())
    monkeypatch.setattr(race.rates, "run", lambda *a, **o: {"curve": {}, "error": "Missing: x"})
    found = race.rates.search(task, "soap", 1.0, race.task.Setting(), lambda line: None)
    assert len(found["tried"]) == 3 and found["tried"][0]["error"] == "Missing: x"


def test_an_exception_is_a_result(race):
    task = race.small.regression(race.task.Setting())
    task.loss = lambda model, batch: 1 / 0
    result = race.runner.run(task, "hf", 0, 0.1)
    assert "ZeroDivisionError" in result["error"]


def test_a_step_that_ends_late_does_not_count(race, monkeypatch):
    task = race.small.regression(race.task.Setting())
    seconds = iter([1.0, 1.0, 1.0, 1.5])
    monkeypatch.setattr(
        race.runner.Stopwatch, "time", lambda self, c, p: pause(self, c, next(seconds))
    )

    def pause(watch, contender, passed):
        contender.step(0.0)
        watch.seconds += passed
        return passed

    result = race.runner.run(task, "adam", 0, 4.0, rate={"lr": 1e-3})
    assert result["curve"]["seconds"][-1] == 3.0 and result["curve"]["steps"][-1] == 3


def test_minibatches_grow_for_ours_alone(race):
    x = torch.rand(64, 2, dtype=torch.float64)
    y = race.small.regression_function(x)
    task = race.task.supervised(
        *("tiny", "tiny", race.small.regression_model, (x, y), (x, y)),
        *(torch.nn.functional.mse_loss, {}),
        batches=race.task.Batches(
            16, growth=2.0, curvature_fraction=0.5, gradient_split=10, split_size=5
        ),
        peer_batch=8,
    )
    sizes = []
    loss = task.loss
    task.loss = lambda model, batch: (sizes.append(len(batch[0])), loss(model, batch))[1]
    contender, _ = race.contenders.make_contender("hf", task, task.make_model(), 0, {})
    batches = []
    for _ in range(7):  # 4 of 16, 2 of 32, 1 of 64
        contender.step(0.0)
        batches.append(contender.notes()["batch_cases"])
    assert batches == [16, 16, 16, 16, 32, 32, 64] and max(sizes) <= 10
    for name, cases in (("hf-plain", 64), ("hf-plain:batch_size=16", 16)):  # 2,000, or all
        plain, _ = race.contenders.make_contender(name, task, task.make_model(), 0, {})
        for _ in range(7):
            plain.step(0.0)
            assert plain.notes()["batch_cases"] == cases
    sizes.clear()
    race.contenders.make_contender("sgd", task, task.make_model(), 0, {"lr": 0.1})[0].step(0.0)
    assert sizes == [8]


@pytest.mark.parametrize(
    ("target", "seconds"), [(10.0, 1.0), (1.0, 2.0), (math.sqrt(10), 1.5), (0.1, None)]
)
def test_time_to_a_target_is_interpolated(race, target, seconds):
    run = {"curve": {"seconds": [1.0, 2.0], "loss": [10.0, 1.0]}}
    found = race.record.seconds_to(run, "loss", target)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("seconds", "value"),
    [(0.5, 0.8), (1.0, 0.8), (1.25, 0.8 * 0.5**0.25), (3.0, 0.22**0.5), (None, None)],
)
def test_a_metric_between_two_points(race, seconds, value):
    run = {"curve": {"seconds": [1.0, 2.0, 2.5, 4.0], "error": [0.8, 0.4, None, 0.55]}}
    found = race.record.value_at(run, "error", seconds)
    assert found == (None if value is None else pytest.approx(value))


def test_the_test_metric_where_plain_hf_ends(race, tmp_path):
    record = race.record.Record(tmp_path / "race.json")
    record.about = {"train_metric": "loss", "test_metric": "error"}

    def run(name, seconds, loss, error):
        curve = {"seconds": seconds, "loss": loss, "error": error, "steps": [1, 2, 3]}
        return {"optimizer": name, "seed": 0, "budget": 4.0, "curve": curve}

    record.runs = [
        run("hf-plain:growth=1", [0.0, 2.0, 4.0], [10.0, 4.0, 1.0], [0.9, 0.6, 0.5]),
        run("hf", [0.0, 1.0, 4.0], [10.0, 1.0, 0.1], [0.9, 0.4, 0.45]),
        run("sgd", [0.0, 2.0, 4.0], [10.0, 9.0, 8.0], [0.9, 0.8, 0.7]),
    ]
    record.sessions = [race.record.session("", "cpu", 1)]
    found = {row["optimizer"]: row for row in race.record.summary(record)}
    assert found["hf"]["seconds_to_end_of"] == {"hf-plain:growth=1": 1.0}
    assert found["hf"]["test_at_end_of"] == {"hf-plain:growth=1": 0.4}
    assert found["sgd"]["test_at_end_of"] == {"hf-plain:growth=1": None}
    header, rows = race.report.table(record)
    assert header[-2:] == ["s to hf-plain:growth=1's end", "error there"]
    assert [row[-2:] for row in rows] == [["1", "0.4"], ["4", "0.5"], ["–", "–"]]


@pytest.mark.parametrize("name", ["hf:averaging=0.5", "sgd:lr=0.01:averaging=0.5"])
def test_a_running_mean_of_weights_is_what_is_evaluated(race, name):
    task = race.tasks.TASKS["regression"](race.task.Setting())
    torch.manual_seed(0)
    model = task.make_model()
    contender, options = race.contenders.make_contender(name, task, model, 0, {})
    assert options["averaging"] == 0.5
    mean = None
    for _ in range(4):
        contender.step(0.0)
        values = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        mean = values if mean is None else 0.5 * mean + 0.5 * values
    shown = race.contenders.evaluated(contender, model)
    found = torch.cat([p.detach().reshape(-1) for p in shown.parameters()])
    torch.testing.assert_close(found, mean)
    assert not torch.equal(found, values)


def test_options_in_names(race):
    assert race.contenders.split_name("hf:growth=1.1:preconditioner=none") == (
        "hf",
        {"growth": 1.1, "preconditioner": "none"},
    )
    for wrong in ("nobody", "hf:growth"):
        with pytest.raises(ValueError, match=r"no optimizer|key=value"):
            race.contenders.split_name(wrong)


def test_the_documentation_has_a_place_for_the_tables(race):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert "TABLES" in race.report.placed(page, "TABLES")
    for name in [*race.tasks.TASKS, *race.contenders.OURS, *race.peers.PEERS]:
        assert f"`{name}`" in page, f"docs/benchmarks.md does not say what {name} is"


# --- what the pairs are worth to CG ---


@pytest.fixture
def work(race):
    return import_module("benchmarks.cg_work")


def test_curves_are_compared_at_equal_products(work):
    row = {
        "with": {"curve": [(1, -2.0), (3, -4.0)], "seconds": 3.0},
        "without": {"curve": [(1, -1.0), (3, -2.0), (6, -3.0)], "seconds": 2.0},
    }
    assert work.ratios_at([row], 1) == [2.0]
    assert work.ratios_at([row], 2) == [2.0]  # what was kept last
    assert work.ratios_at([row], 3) == [2.0]
    assert work.ratios_at([row], 6) == [pytest.approx(4 / 3)]  # what has ended keeps its value
    assert work.ratios_at([row], 7) == []
    products, seconds = work.to_match(row)
    assert products == pytest.approx(3 / 6)
    assert seconds == pytest.approx(3.0 / 2.0)


def test_a_solve_that_never_gets_there_is_infinitely_late(work):
    row = {
        "with": {"curve": [(1, -2.0)], "seconds": 3.0},
        "without": {"curve": [(1, -1.0), (3, -4.0)], "seconds": 2.0},
    }
    assert work.to_match(row) == (math.inf, math.inf)
    assert work.text(math.inf) == "never"


def test_the_comparison_leaves_the_run_as_it_is(race, work):
    import torch_hf.optimizer.hf

    before = torch_hf.optimizer.hf.conjugate_gradients
    setting = race.task.Setting()
    rows = work.compare("regression", setting, 3)
    assert torch_hf.optimizer.hf.conjugate_gradients is before
    assert len(rows) == 2 and all(len(r["with"]["curve"]) > 1 for r in rows)
    figures = work.summary(rows)
    assert figures["steps"] == 2 and figures["deeper"][1] > 0
    task = race.tasks.TASKS["regression"](setting)
    torch.manual_seed(0)
    alone = race.contenders.HF(task, task.make_model(), 0, work.WITH_PAIRS)
    for _ in range(3):
        alone.step(0.0)
    assert alone.optimizer.last_report.cg_iterations == rows[-1]["with"]["curve"][-1][0]
