"""Speed and memory beside learn2learn and a hand-written loop: `make bench` (a quarter of an hour), `--rounds 3` for less.

Contenders take turns within each round; a ratio is the median of the rounds' ratios, with the interval of its middle
95 %. Gradients are compared in float64 before anything is timed.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import learn2learn as l2l
import torch
from torch import nn

from metalearn_utils import Learner, Tasks, conv4, cross_entropy, fomaml, maml, mlp, mse, params_of, reptile, sgd
from metalearn_utils.parallel import unstack
from metalearn_utils.tasks.base import Batch
from metalearn_utils.tasks.sinusoids import Sinusoids
from metalearn_utils.trace import Replay

import bench_rules

TURN, RATE = 0.1, 0.001
ALGORITHMS = {"MAML": maml, "FOMAML": fomaml, "Reptile": reptile}


class Plain(nn.Module):
    """A network that is not the library's own: it goes through vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def peer(model: nn.Module, loss: Callable, tasks: Tasks, lr: float, steps: int, kind: str) -> list[torch.Tensor]:
    """learn2learn's meta-gradient (for Reptile: mean(theta - theta_K) by its clone and adapt)."""
    learner = l2l.algorithms.MAML(model, lr=lr, first_order=kind != "MAML")
    total = 0.0
    moved = [torch.zeros_like(p) for p in model.parameters()]
    for task in unstack(tasks):
        clone, x, y = learner.clone(), *task.support
        if kind == "Reptile":
            x, y = torch.cat([x, task.query.x]), torch.cat([y, task.query.y])
        for _ in range(steps):
            clone.adapt(loss(clone(x), y))
        if kind == "Reptile":
            adapted = [p.detach() for p in clone.parameters()]
            moved = [m + p.detach() - a for m, p, a in zip(moved, model.parameters(), adapted)]
        else:
            total = total + loss(clone(task.query.x), task.query.y) / len(tasks.support.x)
    if kind == "Reptile":
        return [m / len(tasks.support.x) for m in moved]
    return list(torch.autograd.grad(total, list(model.parameters())))


def loop(model: nn.Module, loss: Callable, tasks: Tasks, lr: float, steps: int, kind: str) -> list[torch.Tensor]:
    """The loop over tasks that everybody writes, with functional_call."""
    theta = dict(model.named_parameters())
    total, moved = 0.0, [torch.zeros_like(p) for p in theta.values()]
    for task in unstack(tasks):
        params, (x, y) = dict(theta), task.support
        if kind == "Reptile":
            x, y = torch.cat([x, task.query.x]), torch.cat([y, task.query.y])
        for _ in range(steps):
            value = loss(torch.func.functional_call(model, params, (x,)), y)
            grads = torch.autograd.grad(value, list(params.values()), create_graph=kind == "MAML")
            params = {k: p - lr * g for (k, p), g in zip(params.items(), grads)}
        if kind == "Reptile":
            moved = [m + (p - a).detach() for m, p, a in zip(moved, theta.values(), params.values())]
        else:
            out = torch.func.functional_call(model, params, (task.query.x,))
            total = total + loss(out, task.query.y) / len(tasks.support.x)
    if kind == "Reptile":
        return [m / len(tasks.support.x) for m in moved]
    return list(torch.autograd.grad(total, list(theta.values())))


def library(model: nn.Module, loss: Callable, tasks: Tasks, lr: float, steps: int, kind: str) -> list[torch.Tensor]:
    """The library's gradient."""
    return list(ALGORITHMS[kind](Learner(model, loss, sgd(lr), steps), params_of(model), tasks).theta.values())


def contest(contenders: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each contender in each round, one after the other.

    Each turn lasts about TURN seconds, as many calls as fit: as in a training loop, the caches are warm.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    calls = {name: max(1, round(TURN / seconds(run, 1))) for name, run in contenders.items()}
    for _ in range(rounds):
        for name, run in contenders.items():
            found[name].append(seconds(run, calls[name]))
    return found


def seconds(run: Callable, calls: int) -> float:
    """Mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def ratio(times: dict[str, list[float]], reference: str, name: str) -> tuple[float, float, float]:
    """Median of reference / name over rounds, and the interval of its middle 95 %."""
    values = sorted(a / b for a, b in zip(times[reference], times[name]))
    cut = max(0, int(0.025 * len(values)))
    return statistics.median(values), values[cut], values[-1 - cut]


def agree(model: nn.Module, loss: Callable, tasks: Tasks, lr: float, steps: int, kind: str) -> None:
    """Stop unless all three give the same gradient in float64."""
    model, tasks = model.double(), tasks.to(dtype=torch.float64)
    expected = loop(model, loss, tasks, lr, steps, kind)
    for run in (peer, library):
        gap = max((a - b).abs().max().item() for a, b in zip(run(model, loss, tasks, lr, steps, kind), expected))
        assert gap < 1e-8, f"{run.__name__} differs from the loop by {gap} ({kind})"
    model.float()


def report(label: str, found: tuple[float, float, float], goal: float, at_least: bool = True) -> None:
    """One line of the table."""
    met = found[0] >= goal if at_least else found[0] <= goal
    sign = ">=" if at_least else "<="
    print(f"{label:58s} {found[0]:6.2f}x [{found[1]:.2f}, {found[2]:.2f}]  goal {sign} {goal}x  {'met' if met else 'MISSED'}", flush=True)


def sinusoids(rounds: int, threads: int) -> None:
    """25 tasks, 10 shots, 5 inner steps at a rate at which untrained networks do not diverge."""
    tasks = Sinusoids().sample(25, shots=10, queries=10, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for kind, algorithm in ALGORITHMS.items():
        for label, model, goal in (("mlp", mlp(), 15), ("another MLP", Plain(), 7)):
            settings = (model, mse, tasks, RATE, 5, kind)
            agree(*settings)
            runs = {"learn2learn": lambda s=settings: peer(*s), "loop": lambda s=settings: loop(*s)}
            runs["library"] = lambda s=settings: library(*s)
            if label == "mlp":
                replay, theta = Replay(algorithm, learner := Learner(model, mse, sgd(RATE), 5)), params_of(model)
                runs["replayed"] = lambda r=replay, t=theta, a=learner: r(a, t, tasks)
            times = contest(runs, rounds)
            report(f"{threads} thread(s)  {kind}, {label}, learn2learn / library", ratio(times, "learn2learn", "library"), goal)
            if "replayed" in runs:
                label = f"{threads} thread(s)  {kind}, inside meta_train, learn2learn / library"
                report(label, ratio(times, "learn2learn", "replayed"), 30)


def images(rounds: int, threads: int) -> None:
    """Conv4-64, 5-way 1-shot, 15 queries per class, 4 tasks, 5 steps."""
    generator = torch.Generator().manual_seed(0)
    y = [torch.arange(5).repeat(n).expand(4, -1) for n in (1, 15)]
    tasks = Tasks(*(Batch(torch.rand(4, v.shape[1], 1, 28, 28, generator=generator), v) for v in y))
    for kind in ("MAML", "FOMAML"):
        settings = (conv4(5, 64), cross_entropy, tasks, 0.1, 5, kind)
        agree(*settings)
        runs = {r.__name__: lambda r=r, s=settings: r(*s) for r in (peer, loop, library)}
        times = contest(runs, rounds)
        best = min(("peer", "loop"), key=lambda name: statistics.median(times[name]))
        label = f"{threads} thread(s)  Conv4-64 {kind}, library / best of learn2learn, loop"
        report(label, ratio(times, "library", best), 1.10, at_least=False)


def memory_of(steps: int, recompute: bool) -> tuple[float, float]:
    """Peak memory growth (MiB) and seconds of one second-order Conv4-64 meta-gradient, in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(steps), str(int(recompute))]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(map(float, out.split()))


def measure(steps: int, recompute: bool) -> None:
    """Print the growth of the peak and the seconds: one task, 15 query images."""
    torch.set_num_threads(1)
    y = torch.arange(5).repeat(1).expand(1, -1)
    tasks = Tasks(Batch(torch.rand(1, 5, 1, 28, 28), y), Batch(torch.rand(1, 15, 1, 28, 28), torch.arange(5).repeat(3)[None]))
    model = conv4(5, 64)
    theta = params_of(model)
    maml(Learner(model, cross_entropy, sgd(0.01), 1, recompute=recompute), theta, tasks)
    before, start = peak(), time.process_time()
    maml(Learner(model, cross_entropy, sgd(0.01), steps, recompute=recompute), theta, tasks)
    print(peak() - before, time.process_time() - start)


def peak() -> float:
    """The most memory this process has held, in MiB (Linux). `getrusage` would count the parent process too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(rounds: int) -> None:
    """MiB per extra inner step, and the price in time."""
    grown = {mode: (memory_of(40, mode)[0] - memory_of(10, mode)[0]) / 30 for mode in (False, True)}
    pairs = [(memory_of(20, True)[1], memory_of(20, False)[1]) for _ in range(max(3, rounds // 3))]
    slower = sorted(a / b for a, b in pairs)
    print(f"memory per extra inner step: {grown[False]:.2f} MiB unrolled, {grown[True]:.2f} MiB recomputed  goal <= 1.5  "
          f"{'met' if grown[True] <= 1.5 else 'MISSED'}")  # fmt: skip
    report("time of recomputing / unrolling, 20 steps", (statistics.median(slower), slower[0], slower[-1]), 1.25, False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--measure", nargs=2, type=int)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure[0], bool(arguments.measure[1]))
    torch.manual_seed(0)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sinusoids(arguments.rounds, threads)
        images(max(3, arguments.rounds // 3), threads)
        bench_rules.learned(arguments.rounds, threads, contest, ratio, report)
    memory(arguments.rounds)


if __name__ == "__main__":
    main()
