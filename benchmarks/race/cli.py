"""The race's command line: which tasks, optimizers and seeds, for how long, on what."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .contenders import ON_FULL_BATCH, OURS, split_name
from .peers import PEERS
from .rates import PART, PATH, Rates, search
from .record import Record, session
from .report import as_markdown, as_text, placed, plot, write_csv
from .runner import POINTS, Training, run, take_turns, warm_up
from .schedule import fitting, search_length
from .task import Missing, RaceTask, Setting
from .tasks import TASKS

RESULTS = Path(__file__).parents[1] / "results"
#: Where races go that are not to replace the record.
ASIDE = Path("runs") / "bench"
#: The literal baseline with its gradient over all cases is slow; it runs where it is named.
USUAL = [name for name in [*OURS, *PEERS] if name != "hf-kingsbury"]
#: Peers that make no sense where a step sees a part of the data.
ON_FULL_BATCH_ALONE = ["adam-lbfgs", *(name for name, spec in PEERS.items() if spec.dense)]

#: Arguments that say where things lie, or what is in the record anyway.
ELSEWHERE = (
    *("data_root", "download", "output", "rates", "resume", "search_budget"),
    *("record", "csv"),
)


def make_parser() -> argparse.ArgumentParser:
    """All arguments; those without a default here take the task's."""
    parser = argparse.ArgumentParser(
        description="Race optimizers on equal wall-clock.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK", help=f"{[*TASKS]}"
    )
    add(
        "--optimizers",
        nargs="+",
        default=USUAL,
        metavar="NAME",
        help=f"of {[*OURS, *PEERS]}; options behind colons, as in hf:cg_max_iter=20:growth=1.1",
    )
    add("--seeds", type=int, default=3, help="runs of each, from seed 0 on")
    add("--first-seed", type=int, default=0, help="where the seeds begin")
    add("--budget", type=float, help="seconds of training a run, if not the task's own")
    add("--minutes", type=float, help="shorter budgets, such that each task's race fits in so many")
    add("--data-root", type=Path, default=Path("data"), help="folder of the data sets")
    add("--download", action="store_true", help="fetch MNIST and CIFAR-10 if missing")
    add("--device", default="cpu", help="as in torch")
    add("--large", action="store_true", help="sizes meant for a GPU")
    add("--threads", type=int, default=2, help="of the host")
    add("--points", type=int, default=POINTS, help="how often a curve is measured")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="what a second is: of the wall, or of one thread's CPU time (sets --threads 1), "
        "which a busy machine does not lengthen",
    )
    add(
        "--turns",
        type=float,
        metavar="SECONDS",
        help="optimizers of a seed take turns of so many seconds, all in memory at once",
    )
    add(
        "--output",
        type=Path,
        help=f"folder of JSON files and plots, if not {ASIDE}; a report reads benchmarks/results",
    )
    add("--record", action="store_true", help="write into benchmarks/results: replace the record")
    add("--resume", action="store_true", help="keep the runs that are there, add what is missing")
    add(
        "--hf",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options and sampling of ours",
    )
    add("--search", action="store_true", help="search the peers' rates anew (else: where missing)")
    add("--search-only", action="store_true", help="search the missing rates and race nobody")
    add("--search-budget", type=float, help="seconds of each trial, if not a sixth of the race's")
    add("--rates", type=Path, default=PATH, help="file of the rates that were found")
    add(
        "--report", action="store_true", help="race nobody; Markdown tables of what is there, plots"
    )
    add("--csv", type=Path, metavar="FOLDER", help="race nobody; curves of what is there, as CSV")
    add("--into", type=Path, metavar="FILE", help="put the tables into this file's marked place")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, or report on races."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        names = _names(args)
    except ValueError as error:
        parser.error(str(error))
    if args.clock == "cpu":
        if torch.device(args.device).type != "cpu":
            parser.error(f"--clock cpu does not see what {args.device} does; take --clock wall")
        args.threads = 1
    searched_aside = not args.record and args.output is None and args.rates == PATH
    if args.output is None:
        args.output = RESULTS if args.record or args.report or args.csv else ASIDE
    args.searched = args.output / "rates.json" if searched_aside else None
    if args.csv:
        export(args)
        return
    if args.report:
        report(args)
        return
    torch.set_num_threads(args.threads)
    for task_name in args.tasks:
        try:
            task = TASKS[task_name](_setting(args))
        except Missing as error:
            print(f"{task_name}: left out, {error}")
            continue
        if task.full_batch:
            kept = {n: b for n, b in names.items() if b in PEERS or b in ON_FULL_BATCH}
        else:
            kept = {n: b for n, b in names.items() if b not in ON_FULL_BATCH_ALONE}
        race(task, kept, args)


def race(task: RaceTask, names: dict[str, str], args: argparse.Namespace) -> None:
    """All optimizers of the first seed, then of the next: what disturbs the machine hits all.

    With ``--turns``, those of a seed take turns, and the runs are kept when all are done.
    """
    budget = args.budget or task.budget
    if args.minutes:
        budget = min(budget, _fitting(task, names, args))
    rates = _find_rates(task, names, budget, args)
    if args.search_only:
        return
    path = _path(args, task.name)
    record = Record(path, keep=args.resume)
    record.about = {**_about(task), "clock": args.clock}
    record.sessions.append(session(command(args), args.device, args.threads, args.clock))
    warm: set[str] = set()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        turns: list[Training] = []
        for name, base in names.items():
            if args.resume and record.has(name, seed, budget):
                continue
            options: dict[str, Any] = {"device": args.device, "rate": rates.get(base, {})}
            if base not in warm:
                warm_up(task, name, **options)
                warm.add(base)
            options |= {"points": args.points, "clock": args.clock}
            if args.turns:
                turns.append(Training(task, name, seed, budget, **options))
                continue
            _keep(task, record, seed, run(task, name, seed, budget, **options))
        take_turns(turns, args.turns or math.inf)
        for training in turns:
            _keep(task, record, seed, training.result)
    if record.runs:
        print(f"\n{as_text(record)}\n", flush=True)
        plot(record, path.with_suffix(".png"))


def _keep(task: RaceTask, record: Record, seed: int, result: dict[str, Any]) -> None:
    record.add(result)
    print(f"  {task.name} seed {seed} {_line(task, result)}", flush=True)


def report(args: argparse.Namespace) -> None:
    """Tables of the tasks that have a record, on screen or in a file; their plots drawn anew."""
    tables = []
    for task_name in args.tasks:
        path = _path(args, task_name)
        record = Record(path)
        if record.runs:
            tables.append(as_markdown(record))
            plot(record, path.with_suffix(".png"))
            record.write()  # its summary, should the way it is made have changed
    text = "\n".join(tables)
    if args.into is None:
        print(text)
    else:
        args.into.write_text(placed(args.into.read_text(), text))


def export(args: argparse.Namespace) -> None:
    """A CSV file a task, a row a point of a curve."""
    args.csv.mkdir(parents=True, exist_ok=True)
    for task_name in args.tasks:
        record = Record(_path(args, task_name))
        if record.runs:
            path = args.csv / f"{record.path.stem}.csv"
            write_csv(record, path)
            print(path)


def command(args: argparse.Namespace) -> str:
    """How to run it again; folders are left out, which differ from machine to machine."""
    parser, words = make_parser(), ["python benchmarks/race.py"]
    for key, value in vars(args).items():
        if key in (*ELSEWHERE, "searched") or value == parser.get_default(key):
            continue
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def _fitting(task: RaceTask, names: dict[str, str], args: argparse.Namespace) -> float:
    rates, setting = Rates(args.rates, args.searched), _setting(args)
    searches = sum(
        search_length(PEERS[peer])
        for peer in _searched(names)
        if args.search or rates.get(setting, task.name, peer, 0.0) is None
    )
    try:
        budget = fitting(task, args.device, len(names) * args.seeds, searches, args.minutes)
    except ValueError as error:
        raise SystemExit(f"{task.name}: {error}") from error
    print(f"{task.name}: {budget:g} s a run, to end within {args.minutes:g} minutes", flush=True)
    return budget


def _searched(names: dict[str, str]) -> list[str]:
    """Peers whose rate is to be found; one given by hand is not."""
    wanted = [
        base
        for name, base in names.items()
        if base in PEERS and f":{PEERS[base].searched}=" not in name
    ]
    return list(dict.fromkeys(wanted))


def _names(args: argparse.Namespace) -> dict[str, str]:
    """Each name's optimizer; options for all of ours become a part of their names."""
    bases = {name: split_name(name)[0] for name in args.optimizers}
    return {
        ":".join([name, *args.hf]) if base in OURS else name: base for name, base in bases.items()
    }


def _find_rates(
    task: RaceTask, names: dict[str, str], budget: float, args: argparse.Namespace
) -> dict[str, Any]:
    rates, found = Rates(args.rates, args.searched), {}
    for peer in _searched(names):
        seconds = args.search_budget or budget / PART
        known = None if args.search else rates.get(_setting(args), task.name, peer, seconds)
        if known is None:
            entry = search(task, peer, seconds, _setting(args), lambda s: print(s, flush=True))
            rates.put(_setting(args), task.name, peer, entry)
            known = entry["options"]
        found[peer] = known
    return found


def _about(task: RaceTask) -> dict[str, Any]:
    return {
        "name": task.name,
        "title": task.title,
        "train_metric": task.train_metric,
        "test_metric": task.test_metric,
        "targets": [list(target) for target in task.targets],
        **task.dimensions,
    }


def _path(args: argparse.Namespace, task_name: str) -> Path:
    return args.output / f"race-{task_name}-{_setting(args).kind}.json"


def _setting(args: argparse.Namespace) -> Setting:
    return Setting(args.data_root, args.device, args.large, args.download, args.clock)


def _line(task: RaceTask, result: dict[str, Any]) -> str:
    name, curve = result["optimizer"], result["curve"]
    if "error" in result:
        return f"{name}: {result['error']}"
    metrics = (f"{key} {curve[key][-1]}" for key in (task.train_metric, task.test_metric))
    return f"{name}: {curve['steps'][-1]} steps, {', '.join(metrics)}"
