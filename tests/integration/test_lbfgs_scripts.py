"""Scripts for torch.optim.LBFGS, unchanged but for the constructor."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer

# Each script takes the constructor, trains, and returns its losses and its optimizer. The
# pytest parameters below give it L-BFGS's own, and HFOptimizer's with the arguments that stay.


def logistic_regression(make):
    """After scikit-learn's own solver: full batch, a penalty written by hand."""
    torch.manual_seed(0)
    x = torch.randn(100, 5)
    y = (x @ torch.randn(5) + 0.5 * torch.randn(100) > 0).float()
    w = torch.zeros(5, requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    optimizer = make([w, b])
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w + b, y) + 1e-2 * w.pow(2).sum()
        loss.backward()
        return loss

    for _ in range(12):
        losses.append(optimizer.step(closure).item())
    return losses, optimizer


def curve_fitting(make):
    """A network on a curve; the closure asks whether gradients are wanted, as some do."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 50)[:, None]
    y = torch.sin(3 * x)
    model = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))
    criterion = nn.MSELoss()
    optimizer = make(model.parameters())
    losses = []

    def closure():
        if torch.is_grad_enabled():
            optimizer.zero_grad()
        loss = criterion(model(x), y)
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(25):
        optimizer.step(closure)
    return losses, optimizer


def physics_informed_network(make):
    """Burgers-like residual: two derivatives by autograd.grad, boundary terms, one loss."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    network.append(nn.Linear(16, 1))
    points = torch.linspace(0, math.pi, 30)[:, None].requires_grad_(True)
    ends = torch.tensor([[0.0], [math.pi]])
    optimizer = make(network.parameters())
    losses = []

    def closure():
        optimizer.zero_grad()
        u = network(points)
        u_x = torch.autograd.grad(u, points, torch.ones_like(u), create_graph=True)[0]
        u_xx = torch.autograd.grad(u_x, points, torch.ones_like(u_x), create_graph=True)[0]
        residual = u_xx + torch.sin(points)  # -u'' = sin x, u = 0 at both ends
        loss = torch.mean(residual**2) + torch.mean(network(ends) ** 2)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(30):
        optimizer.step(closure)
    error = (network(points) - torch.sin(points)).abs().max().item()
    assert error < 0.05
    return losses, optimizer


class Sequence(nn.Module):
    """The network of PyTorch's time_sequence_prediction example, narrower."""

    def __init__(self):
        super().__init__()
        self.lstm1 = nn.LSTMCell(1, 7)
        self.lstm2 = nn.LSTMCell(7, 7)
        self.linear = nn.Linear(7, 1)

    def forward(self, input, future=0):
        outputs = []
        h_t = torch.zeros(input.size(0), 7, dtype=torch.double)
        c_t = torch.zeros(input.size(0), 7, dtype=torch.double)
        h_t2 = torch.zeros(input.size(0), 7, dtype=torch.double)
        c_t2 = torch.zeros(input.size(0), 7, dtype=torch.double)
        for input_t in input.split(1, dim=1):
            h_t, c_t = self.lstm1(input_t, (h_t, c_t))
            h_t2, c_t2 = self.lstm2(h_t, (h_t2, c_t2))
            output = self.linear(h_t2)
            outputs += [output]
        for _ in range(future):
            h_t, c_t = self.lstm1(output, (h_t, c_t))
            h_t2, c_t2 = self.lstm2(h_t, (h_t2, c_t2))
            output = self.linear(h_t2)
            outputs += [output]
        return torch.cat(outputs, dim=1)


def time_sequence_prediction(make):
    """PyTorch's time_sequence_prediction example: two LSTM cells unrolled, double precision."""
    torch.manual_seed(0)
    data = torch.sin((torch.arange(14.0) + torch.randint(-8, 8, (6, 1))) / 2.0).double()
    input, target = data[2:, :-1], data[2:, 1:]
    test_input, test_target = data[:2, :-1], data[:2, 1:]
    seq = Sequence()
    seq.double()
    criterion = nn.MSELoss()
    optimizer = make(seq.parameters())
    losses = []
    for _ in range(15):

        def closure():
            optimizer.zero_grad()
            out = seq(input)
            loss = criterion(out, target)
            losses.append(loss.item())
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            pred = seq(test_input, future=5)
            test_loss = criterion(pred[:, :-5], test_target).item()
    assert test_loss < 0.3
    return losses, optimizer


def loss_with_a_penalty_of_its_own_backward(make):
    """Two calls of backward() in one closure add up."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randn(40, 1)
    model = nn.Linear(4, 1)
    optimizer = make(model.parameters())
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
        penalty.backward()
        losses.append((loss + penalty).item())
        return loss + penalty

    for _ in range(10):
        optimizer.step(closure)
    return losses, optimizer


SCRIPTS = {
    logistic_regression: 0.6,
    curve_fitting: 0.05,
    physics_informed_network: 0.01,
    time_sequence_prediction: 0.3,
    loss_with_a_penalty_of_its_own_backward: 0.95,
}
by_script = pytest.mark.parametrize(
    ("script", "fraction"), SCRIPTS.items(), ids=[s.__name__ for s in SCRIPTS]
)


@by_script
def test_the_script_with_its_own_constructor(script, fraction):
    """That the scripts are what they say: they train with L-BFGS."""

    def make(params):
        return torch.optim.LBFGS(params, lr=1, max_iter=20, line_search_fn="strong_wolfe")

    losses, _ = script(make)
    assert losses[-1] < fraction * losses[0]


@by_script
def test_the_script_with_hf(script, fraction):
    losses, optimizer = script(lambda params: HFOptimizer(params, lr=1))
    assert optimizer.last_report.new_loss < fraction * losses[0]
    report = optimizer.last_report
    assert report.products > 0 or report.solver in ("exact", "broyden") or report.converged


def test_both_find_the_same_minimum():
    ends = []
    for make in (
        lambda params: torch.optim.LBFGS(params, max_iter=50, line_search_fn="strong_wolfe"),
        lambda params: HFOptimizer(params),
    ):
        losses, _ = logistic_regression(make)
        ends.append(losses[-1])
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)


# PyTorch's MNIST example


class Net(nn.Module):
    """Layer by layer that of PyTorch's MNIST example, narrower and on 12 x 12 pixels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, 1)
        self.conv2 = nn.Conv2d(4, 6, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(96, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(x)
        x = self.conv2(x)
        x = F.relu(x)
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = self.fc1(x)
        x = F.relu(x)
        x = self.dropout2(x)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


class NetOfLogits(Net):
    """The same with cross_entropy's argument as output: Gauss-Newton without a doubt."""

    def forward(self, x):
        original = F.log_softmax
        try:
            F.log_softmax = lambda x, dim: x
            return super().forward(x)
        finally:
            F.log_softmax = original


def mnist(net, loss_function, steps=4, **options):
    torch.manual_seed(0)
    model = net()
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(32) % 4
    data = torch.randn(32, 1, 12, 12, generator=generator)
    for i in range(4):
        data[target == i, :, 3 * i : 3 * i + 3] += 1.0
    optimizer = HFOptimizer(model.parameters(), damping=1.0, cg_max_iter=4, **options)
    reports = []
    model.train()
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            output = model(data)
            loss = loss_function(output, target)
            loss.backward()
            return loss

        optimizer.step(closure)
        reports.append(optimizer.last_report)
    return reports


def test_pytorchs_mnist_example_takes_true_gauss_newton_steps():
    """log_softmax in the network is seen through: the run is cross_entropy's on the logits."""
    found = mnist(Net, F.nll_loss)
    truth = mnist(NetOfLogits, F.cross_entropy)
    for a, b in zip(found, truth, strict=True):
        assert a.new_loss == pytest.approx(b.new_loss, rel=1e-4)
        assert a.reduction_ratio == pytest.approx(b.reduction_ratio, rel=1e-2)
    hessian = mnist(Net, F.nll_loss, curvature="hessian")
    assert hessian[0].loss == found[0].loss
    assert hessian[0].new_loss != pytest.approx(found[0].new_loss, rel=1e-4)


def test_pytorchs_mnist_example_trains_with_dropout():
    reports = mnist(Net, F.nll_loss, steps=12)
    assert all(r.new_loss <= r.loss for r in reports)
    assert reports[-1].new_loss < 0.8 * reports[0].loss
