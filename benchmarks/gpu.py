"""Everything that needs a CUDA GPU, in one run of at most nine minutes: one JSON, printed tables.

python benchmarks/gpu.py

Parts, each in a process of its own with a limit of time, so that one that fails or hangs is a line
in the table: the tests on CUDA; NCCL with one rank, and two where there are two GPUs; products
beside the gradient, kernel launches and waits of the host; training to a target beside Adam and
Muon for the time that is left. Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, print_table, synchronize
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.curvature import GaussNewtonOperator
from torch_hf.curvature.cuda_graph import Recorder
from torch_hf.solver.cg import conjugate_gradients

ROOT = Path(__file__).resolve().parent.parent
#: Seconds in all, and for each part at the most; training has what is left of them.
WHOLE, MOST = 540.0, {"tests": 200.0, "nccl": 60.0, "products": 120.0}
#: What a process has to keep for itself, and the least that a training run is worth.
RESERVE, LEAST = 15.0, 60.0
#: Between a request to end and the end.
GRACE = 5.0
TESTS = ("tests/integration/test_on_a_gpu.py", "tests/integration/test_cuda.py")
#: Names by which the profiler counts launches, and waits of the host.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
LAUNCHES += ("cudaGraphLaunch",)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


# --- networks ---


def mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    net = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU())
    return net.append(nn.Linear(1000, 10)), torch.randn(512, 784), torch.randint(10, (512,))


def cnn(norm: bool = False) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))
    return net, torch.randn(256, 3, 32, 32), torch.randint(10, (256,))


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.layers(x))


def resnet() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), *(Block(64) for _ in range(6))]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return net, torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


class Last(nn.Module):
    """The output of a recurrent layer at its last step, or the mean over places."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.layer(x)
        return self.head(found[0][:, -1] if isinstance(found, tuple) else found.mean(1))


def transformer() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    net = Last(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), 128)
    return net, torch.randn(64, 64, 128), torch.randint(10, (64,))


def lstm() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    net = Last(nn.LSTM(64, 128, batch_first=True), 128)
    return net, torch.randn(128, 50, 64), torch.randint(10, (128,))


NETWORKS = {
    "MLP": mlp,
    "CNN": cnn,
    "CNN with BatchNorm": lambda: cnn(norm=True),
    "ResNet": resnet,
    "transformer": transformer,
    "LSTM": lstm,
}


QUICK = ("MLP", "LSTM")


# --- parts ---


def run_tests(device: str, seconds: float, quick: bool) -> dict[str, Any]:
    """The tests of ``TESTS``, on a GPU those that need one."""
    report = Path("runs").resolve() / "gpu" / "tests.xml"
    chosen = ["-k", "checkpoints" if quick else device if device == "cpu" else "cuda"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *chosen]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits in each run
    done = _run([*command, f"--junitxml={report}"], seconds)
    found: dict[str, Any] = {"exit": done["exit"], "seconds": done["seconds"]}
    if report.exists():
        suite = next(ElementTree.parse(report).iter("testsuite")).attrib
        names = ("tests", "failures", "errors", "skipped")
        found |= {name: int(suite[name]) for name in names}
    if done["exit"]:
        found["end"] = done["end"]
    return found


def run_nccl(device: str, seconds: float, quick: bool) -> dict[str, Any]:
    """Steps on one rank, and on two where there are as many GPUs (on the CPU by Gloo)."""
    ranks = 1 if device == "cpu" else min(2, torch.cuda.device_count())
    found = {}
    for count in range(1, ranks + 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [str(Path(__file__).resolve()), "--part", "rank", "--device", device]
        limit = seconds / ranks
        found[f"{count} ranks"] = _run([*command, f"--nproc-per-node={count}", *script], limit)
    return found


def rank() -> None:
    """One rank's steps; fails where replicas differ or the loss does not fall."""
    import torch.distributed as dist

    from torch_hf import check_replicas

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    own, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", own) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5)).to(device)
    x, y = torch.randn(400, 20, device=device), torch.randint(5, (400,), device=device)
    x, y = x[own::ranks], y[own::ranks]
    optimizer = HFOptimizer(model.parameters(), process_group=dist.group.WORLD)
    for _ in range(5):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    report = optimizer.last_report
    check_replicas(optimizer)
    if not report.new_loss < 1.5:
        raise RuntimeError(f"The loss must be below 1.5 after five steps, got {report.new_loss}.")
    dist.destroy_process_group()


def products(device: torch.device, seconds: float, quick: bool) -> list[dict[str, Any]]:
    """Of each network: a gradient, a product one by one and replayed, and a CG iteration."""
    warnings.filterwarnings("ignore", "Steps are taken under TF32")
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    for name, make in NETWORKS.items():
        if quick and name not in QUICK:
            continue
        if time.monotonic() > end:
            rows.append({"network": name, "error": "no time left"})
            continue
        print(json.dumps(rows), flush=True)  # what there is, should time run out
        try:
            rows.append({"network": name} | _product_row(make, device, 2 if quick else 20))
        except Exception as error:  # a line of the table
            rows.append({"network": name, "error": f"{type(error).__name__}: {error}"[:200]})
    return rows


def _product_row(make: Callable[[], Any], device: torch.device, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x, y = make()
    model, x, y = model.to(device), x.to(device), y.to(device)
    params = list(model.parameters())

    def closure() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    gradient = milliseconds(lambda: torch.autograd.grad(closure(), params), device, rounds)
    recorder = Recorder()
    with recorder.stream(device, alone=True):
        operator = GaussNewtonOperator.from_closure(closure, params)
        v = torch.randn(operator.shape[0], device=device)
        product = milliseconds(lambda: operator(v), device, rounds)
        operator.replays(recorder, expected=10**6)
        replayed = milliseconds(lambda: operator(v), device, rounds)
    row: dict[str, Any] = {
        "parameters": len(v),
        "gradient_ms": gradient,
        "product_ms": product,
        "product_in_gradients": product / gradient,
        "replayed_in_gradients": replayed / gradient,
        "engine": operator.engine,
    }
    for replays in (False, True) if device.type == "cuda" else (False,):
        few, many = (
            _iterations(make, device, n, replays) for n in ((6, 16) if rounds > 2 else (2, 3))
        )
        more = many["iterations"] - few["iterations"]
        how = "replayed" if replays else "eager"
        for kind in ("ms", "launches", "waits"):
            row[f"{kind}_of_iteration_{how}"] = (many[kind] - few[kind]) / more if more else None
    if device.type == "cuda":
        row["waits_of_rest"] = _waits_of_step(make, device, 6)
        gradients = _counted(lambda: torch.autograd.grad(closure(), params))
        row["launches_of_gradient"] = gradients["launches"]
    return row


def milliseconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The mean of some runs, after two to warm up."""
    for _ in range(2):
        run()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / rounds


def _iterations(
    make: Callable[[], Any], device: torch.device, most: int, replays: bool
) -> dict[str, float]:
    """A CG solve of at most so many iterations, after one to warm up: how many, and their cost."""
    torch.manual_seed(0)
    model, x, y = make()
    model, x, y = model.to(device), x.to(device), y.to(device)
    params, recorder = list(model.parameters()), Recorder()
    recorder.usable = replays
    with recorder.stream(device, alone=True):
        operator = GaussNewtonOperator.from_closure(lambda: F.cross_entropy(model(x), y), params)
        gradient = operator.vector.flatten(
            torch.autograd.grad(F.cross_entropy(model(x), y), params)
        )
        made = []

        def solve() -> None:
            operator.replays(recorder, most)
            found = conjugate_gradients(
                lambda v: operator(v).add_(v, alpha=1e-4), gradient, tol=0.0, max_iter=most
            )
            made.append(found.iterations)

        cost = milliseconds(solve, device, 1 if most < 6 else 3)
        found = {"launches": 0, "waits": 0}
        if device.type == "cuda":
            found = _counted(solve)  # counts kernels inside of a graph as one launch
    return {"iterations": made[-1], "ms": cost, **found}


def _waits_of_step(make: Callable[[], Any], device: torch.device, most: int) -> int:
    """Of a step by CG, those of its iterations left out."""
    torch.manual_seed(0)
    model, x, y = make()
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = HFOptimizer(model.parameters(), solver="cg", cg_max_iter=most, cg_tol=0.0)

    def step() -> None:
        optimizer.step(lambda: F.cross_entropy(model(x), y))

    for _ in range(2):
        step()
    waits = _counted(step)["waits"]
    assert optimizer.last_report is not None
    return waits - optimizer.last_report.cg_iterations


def _counted(run: Callable[[], Any]) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        run()
    counts = {event.key: event.count for event in seen.key_averages()}
    return {
        "launches": sum(counts.get(name, 0) for name in LAUNCHES),
        "waits": sum(counts.get(name, 0) for name in WAITS),
    }


def run_training(device: str, seconds: float, data_root: str) -> dict[str, Any]:
    """The deep autoencoder beside Adam and Muon, each for a third of the time."""
    if seconds < LEAST:
        return {"error": f"{seconds:.0f} s left, {LEAST:.0f} needed"}
    command = [sys.executable, str(ROOT / "benchmarks" / "race.py"), "--tasks", "autoencoder"]
    command += ["--optimizers", "hf", "adam:lr=0.001", "muon:lr=0.03", "--seeds", "1"]
    budget = (seconds - 2 * RESERVE) / 3
    command += ["--budget", f"{budget:.0f}", "--device", device, "--data-root", data_root]
    done = _run(command, seconds)
    if "left out" in done["end"]:
        done["error"] = "MNIST was not found: GPU='--data-root FOLDER', or --no-training"
    return done | {"budget": budget}


def _run(command: list[str], seconds: float, most: int = 3000) -> dict[str, Any]:
    """A command's exit status, its seconds and the end of what it printed, so many characters."""
    start = time.monotonic()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    done = subprocess.Popen(
        command,
        cwd=ROOT,
        env=surroundings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = done.communicate(timeout=max(seconds, 1.0))
        status = done.returncode
    except subprocess.TimeoutExpired:
        done.terminate()  # torchrun ends its workers, which have sessions of their own
        try:
            printed, _ = done.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            printed, _ = done.communicate()
        status = 124
    return {"exit": status, "seconds": time.monotonic() - start, "end": printed[-most:]}


# --- the whole ---


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run")
    parser.add_argument("--quick", action="store_true", help="few rounds and tests, no training")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="in all")
    parser.add_argument("--data-root", default="data", help="folder of MNIST")
    parser.add_argument("--no-training", action="store_true", help="leave the autoencoder out")
    parser.add_argument("--record", action="store_true", help="keep the JSON in benchmarks/results")
    parser.add_argument("--part", choices=("rank", "products"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.part == "rank":
        rank()
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA GPU was found, and everything here needs one. --device cpu is a dry run.")
        return 2
    device = torch.device(options.device)
    if options.part == "products":
        print(json.dumps(products(device, MOST["products"], options.quick)))
        return 0
    end = time.monotonic() + options.seconds

    def left(part: str) -> float:
        return min(MOST[part], end - time.monotonic() - RESERVE)

    folder = RESULTS if options.record else Path("runs") / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    (Path("runs") / "gpu").mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"environment": environment(device, torch.get_num_threads())}
    found["tests"] = run_tests(options.device, left("tests"), options.quick)
    found["nccl"] = run_nccl(options.device, left("nccl"), options.quick)
    own = [sys.executable, str(Path(__file__).resolve()), "--part", "products"]
    own += ["--device", options.device, *(["--quick"] if options.quick else [])]
    done = _run(own, left("products") + RESERVE, most=10**6)
    last = (done["end"].strip().splitlines() or [""])[-1]
    found["products"] = json.loads(last) if last[:1] == "[" else done
    if isinstance(found["products"], list) and done["exit"]:
        found["products"].append({"network": "the others", "error": "no time left"})
    if not (options.quick or options.no_training):
        rest = end - time.monotonic() - RESERVE
        found["training"] = run_training(options.device, rest, options.data_root)
    path = folder / f"gpu-{options.device}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    print(f"\nwritten: {path}")
    return int(failed(found))


def failed(found: dict[str, Any]) -> bool:
    """Whether a part did not come to its end."""
    runs = [found["tests"], *found["nccl"].values()]
    rows = found["products"] if isinstance(found["products"], list) else [{"error": "no table"}]
    rows = [*rows, found.get("training", {})]
    runs += [found["training"]] if "exit" in found.get("training", {}) else []
    return any(run["exit"] for run in runs) or any("error" in row for row in rows)


def show(found: dict[str, Any]) -> None:
    """Prints the tables."""
    tests = found["tests"]
    rows = [["tests", str(tests["exit"]), f"{tests['seconds']:.0f}", _counts(tests)]]
    rows += [
        [name, str(run["exit"]), f"{run['seconds']:.0f}", _last(run) if run["exit"] else ""]
        for name, run in found["nccl"].items()
    ]
    print_table(f"on {found['environment']['device']}", ["part", "exit", "s", "notes"], rows)
    names = ["gradient_ms", "product_in_gradients", "replayed_in_gradients"]
    names += ["launches_of_gradient", "launches_of_iteration_eager"]
    names += ["launches_of_iteration_replayed", "ms_of_iteration_eager"]
    names += ["ms_of_iteration_replayed", "waits_of_iteration_replayed", "waits_of_rest"]
    if isinstance(found["products"], list):
        rows = [
            [row["network"], *(_number(row.get(name)) for name in names), row.get("error", "")]
            for row in found["products"]
        ]
        print_table("products", ["network", *names, "error"], rows)
    if "training" in found:
        print("\n" + found["training"].get("end", found["training"].get("error", "")))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _counts(tests: dict[str, Any]) -> str:
    names = ("tests", "failures", "errors", "skipped")
    return ", ".join(f"{tests[name]} {name}" for name in names if name in tests)


def _last(run: dict[str, Any]) -> str:
    return (run["end"].strip().splitlines() or [""])[-1][:80]


if __name__ == "__main__":
    sys.exit(main())
