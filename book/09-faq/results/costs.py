"""The table of "Questions people ask": `python book/09-faq/results/costs.py [--cache DIR]`.

What meta-training costs (CPU seconds, peak memory), and what tuning Adam anew on every new task costs in its place.
Meta-trained networks: the recipes of `metalearn_utils.recipes.sinusoids` for 10 shots, three seeds. A user without past
tasks holds out a fifth of a new task's points, tries three rates of Adam, keeps the rate and the number of steps with
the least held-out error, and trains again on all points. About 9 CPU minutes on one thread; what takes long is kept in
the cache, so that an interrupted run goes on.
"""

import argparse
import base64
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from metalearn_utils import Learner, Scores, Tasks, adam, evaluate, fomaml, joint, maml, meta_train, mse, params_of
from metalearn_utils import reptile, results
from metalearn_utils.processes import gaussian_process
from metalearn_utils.recipes import sinusoids
from metalearn_utils.recreate import recreate
from metalearn_utils.rules import Params
from metalearn_utils.tasks.base import Batch
from metalearn_utils.tasks.sinusoids import Sinusoids

HERE = Path(__file__).parent
SEEDS, SHOTS, TASKS, STEPS, LARGE = (0, 1, 2), (10, 40), 600, 10, 100.0
RECIPES = {
    "MAML": "sinusoid-maml-10",
    "FOMAML": "sinusoid-fomaml",
    "Reptile": "sinusoid-reptile",
    "joint training": "sinusoid-joint",
}
ALGORITHMS = {"MAML": maml, "FOMAML": fomaml, "Reptile": reptile, "joint training": joint}
TRIALS = {
    "MAML": (0.003, 0.01, 0.02),
    "FOMAML": (0.003, 0.01, 0.02),
    "Reptile": (0.001, 0.003, 0.01),
    "joint training": (0.0003, 0.001, 0.003),
    "Adam from scratch": (0.005, 0.015, 0.05),
    "Gaussian process": (1.0, 2.0, 4.0),
}
CHECKS = {10: (10, 30, 100, 200, 300), 40: (10, 30, 100, 150, 200, 250, 300, 400, 500)}
HELD_OUT = 5  # one point in five


def depends() -> list[Path]:
    """The files that the table depends on."""
    package = results.ROOT
    code = ("recipes/sinusoids.py", "models.py", "tasks/sinusoids.py", "processes.py")
    weights = [package / "weights" / f"{name}.pt" for name in RECIPES.values()]
    return [*(package / name for name in code), Path(__file__), *weights]


def fixed_tasks(shots: int, tasks: int = TASKS, seed: int = 100, dtype: torch.dtype = torch.float64) -> Tasks:
    """Fixed tasks with 100 query points each; seed 100 for tests, 200 for validation."""
    generator = torch.Generator().manual_seed(seed)
    return Sinusoids().sample(tasks, shots=shots, queries=100, generator=generator, dtype=dtype)


def trained(method: str, seed: int, cache: Path) -> Params:
    """The stored (float32) weights of one recipe and seed, as float64; trained now unless the cache has them."""
    folder, name = cache / f"seed{seed}", RECIPES[method]
    if not (folder / f"{name}.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        recreate(name, seed, folder, folder / f"{name}.ckpt")
    return {k: v.double() for k, v in torch.load(folder / f"{name}.pt", weights_only=True).items()}


def remembered(path: Path, run: Callable[[], tuple[dict, list[int]]]) -> tuple[dict, list[int]]:
    """The entry and the choices that `path` holds, or of a run now."""
    if not path.exists():
        path.write_text(json.dumps(run()), "utf-8")
    return tuple(json.loads(path.read_text("utf-8")))


# Meta-trained: ten inner steps at a rate chosen on validation tasks.


def score(theta: Params, lr: float, tasks: Tasks) -> Scores:
    """Mean squared error after 0, 1, ..., 10 steps of gradient descent at rate `lr`."""
    return evaluate(sinusoids.learner(lr, STEPS), theta, tasks, metric="mse")


def tune(method: str, theta: Params) -> dict:
    """Three trials of the inner rate on 200 validation tasks of 10 points."""
    tasks = fixed_tasks(10, 200, seed=200)
    errors = [tidy(score(theta, lr, tasks).mean[-1].item()) for lr in TRIALS[method]]
    best = min((e, lr) for e, lr in zip(errors, TRIALS[method]) if e is not None)[1]
    return {"method": method, "tried": list(TRIALS[method]), "errors": errors, "chosen": best}


def adapted(method: str, theta: Params, rate: float, shots: int, seed: int) -> dict:
    """The entry of one meta-trained network."""
    found = score(theta, rate, fixed_tasks(shots))
    return entry(method, shots, seed, found.per_task) | {"lr": rate}


# Not meta-trained: everything is chosen anew on each task.


def adam_errors(theta: Params, data: Batch, probe: Batch, rate: float, checks: tuple[int, ...]) -> Tensor:
    """Errors on `probe` after the steps in `checks` of Adam on `data`: [checks, tasks].

    All tasks at once: Adam acts on each number alone, and the sum of the losses gives each task its own gradient.
    """
    model, found = sinusoids.network(), []
    params = {k: v.float().expand(len(data.x), *v.shape).clone().requires_grad_() for k, v in theta.items()}
    optimizer = torch.optim.Adam(params.values(), lr=rate, fused=True)
    for step in range(1, max(checks) + 1):
        optimizer.zero_grad()
        error(model.stacked(params, data.x), data.y).sum().backward()
        optimizer.step()
        if step in checks:
            with torch.no_grad():
                found.append(error(model.stacked(params, probe.x), probe.y))
    return torch.stack(found)


def error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each task, [tasks]."""
    return ((outputs - y) ** 2).mean((1, 2))


def split(support: Batch, seed: int) -> tuple[Batch, Batch]:
    """The points that are trained on, and the fifth that is held out."""
    n = support.x.shape[1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = order[n // HELD_OUT :], order[: n // HELD_OUT]
    return tuple(Batch(support.x[:, rows], support.y[:, rows]) for rows in parts)


def tuned_adam(shots: int, seed: int) -> tuple[dict, list[int]]:
    """The entry of Adam from random weights, with one column for each bound on the number of steps; chosen rates."""
    tasks, theta, checks = fixed_tasks(shots, dtype=torch.float32), sinusoids.initial(seed), CHECKS[shots]
    rates, (kept, held) = TRIALS["Adam from scratch"], split(tasks.support, seed)
    seen = torch.stack([adam_errors(theta, kept, held, rate, checks) for rate in rates])
    true = torch.stack([adam_errors(theta, tasks.support, tasks.query, rate, checks) for rate in rates])
    best = [seen[:, :n].flatten(0, 1).argmin(0) for n in range(1, len(checks) + 1)]  # rate * n + check, per task
    errors = [true[:, :n].flatten(0, 1).gather(0, b[None])[0] for n, b in enumerate(best, 1)]
    steps = [torch.tensor(checks)[b % n].double().mean().item() for n, b in enumerate(best, 1)]
    about = entry("Adam from scratch", shots, seed, torch.stack(errors))
    about |= {"steps": list(checks), "chosen_steps": [tidy(s, 1e9) for s in steps]}
    hindsight = true.flatten(0, 1).min(0).values.mean().item()  # the best rate and step for each test task
    return about | {"hindsight": tidy(hindsight)}, (best[-1] // len(checks)).tolist()


def tuned_process(shots: int, seed: int) -> tuple[dict, list[int]]:
    """The entry of a Gaussian process whose length is chosen on held-out points; chosen lengths."""
    tasks = fixed_tasks(shots)
    kept, held = split(tasks.support, seed)
    seen, true = (torch.stack([error(gaussian_process(data, probe.x, length), probe.y) for length in
                               TRIALS["Gaussian process"]]) for data, probe in ((kept, held), tasks))  # fmt: skip
    best = seen.argmin(0)
    return entry("Gaussian process", shots, seed, true.gather(0, best[None])), best.tolist()


def tuning_of(method: str, choices: list[int]) -> dict:
    """The record of choices made task by task: how many tasks chose each value, and which was chosen most often."""
    tried = TRIALS[method]
    counts = [choices.count(i) for i in range(len(tried))]
    return {"method": method, "tried": list(tried), "tasks": counts, "chosen": tried[counts.index(max(counts))]}


def entry(method: str, shots: int, seed: int, per_task: Tensor) -> dict:
    """Mean, interval and median of each column, and each task's error in the last, as float32 in base64."""
    half = 1.96 * per_task.std(1) / per_task.shape[1] ** 0.5
    columns = {"mean": per_task.mean(1), "half": half, "median": per_task.median(1).values}
    about = {"method": method, "shots": shots, "seed": seed}
    about |= {name: [tidy(v) for v in values.tolist()] for name, values in columns.items()}
    return about | {"last": base64.b64encode(per_task[-1].float().numpy().tobytes()).decode()}


def tidy(value: float, limit: float = LARGE) -> float | None:
    """Five digits, or null for an error that says no more than "it diverges"."""
    return float(f"{value:.5g}") if value < limit else None


# What it costs.


def seconds() -> tuple[dict[str, float], dict[str, float]]:
    """CPU seconds of an outer step of each method, and on one new task of 40 points alone in plain PyTorch.

    All take turns in five rounds, so that a busy machine is busy for all of them; each figure is a median over rounds.
    """
    outer = {method: partial(step_seconds, method) for method in ALGORITHMS}
    task = fixed_tasks(40, 1, dtype=torch.float32)
    support, query = (Batch(x[0], y[0]) for x, y in task)
    inner = {
        "ten steps of gradient descent": partial(plain_seconds, torch.optim.SGD, support, query, STEPS),
        "one step of Adam": lambda: plain_seconds(torch.optim.Adam, support, query, 300) / 300,
        "one step of Adam, 25 tasks stacked": partial(stacked_seconds, fixed_tasks(40, 25, dtype=torch.float32)),
        "Gaussian process": partial(process_seconds, task),
    }
    rounds = [{name: run() for name, run in (outer | inner).items()} for _ in range(5)]
    found = {name: float(f"{statistics.median(r[name] for r in rounds):.3g}") for name in rounds[0]}
    return {k: found[k] for k in outer}, {k: found[k] for k in inner}


def step_seconds(method: str) -> float:
    """Median CPU seconds between two outer steps of the recipe, out of 200."""
    recipe = partial(sinusoids.train, algorithm=ALGORITHMS[method])
    marks, recipe = [], sinusoids.train_reptile if method == "Reptile" else recipe

    class Marked(Sinusoids):
        def sample(self, *arguments, **settings) -> Tasks:
            marks.append(time.process_time())
            return super().sample(*arguments, **settings)

    sinusoids.Sinusoids = Marked
    try:
        recipe(0, 15000, stop=200, progress=False)
    finally:
        sinusoids.Sinusoids = Sinusoids
    return statistics.median(b - a for a, b in zip(marks, marks[1:]))


def plain_seconds(optimizer: Callable, support: Batch, query: Batch, steps: int) -> float:
    """CPU seconds of a training loop as one writes it, and a prediction; for short ones the median of 20."""

    def run() -> None:
        model = sinusoids.network()
        rule = optimizer(model.parameters(), lr=0.001)
        for _ in range(steps):
            rule.zero_grad()
            torch.nn.functional.mse_loss(model(support.x), support.y).backward()
            rule.step()
        model(query.x)

    return median_seconds(run, 1 if steps > 100 else 20)


def stacked_seconds(tasks: Tasks, steps: int = 100) -> float:
    """CPU seconds per task of one step of Adam on many tasks at once."""
    learner = Learner(sinusoids.network(), mse, adam(0.001), steps)
    theta = params_of(learner.model)
    run = partial(evaluate, learner, theta, tasks, metric="mse")
    return median_seconds(run, 5) / (steps * len(tasks.support.x))


def process_seconds(task: Tasks) -> float:
    """CPU seconds of choosing a Gaussian process on held-out points and predicting with it."""
    fit, held = split(task.support, 0)

    def run() -> None:
        for length in TRIALS["Gaussian process"]:
            error(gaussian_process(fit, held.x, length), held.y)
        gaussian_process(task.support, task.query.x, 2.0)

    return median_seconds(run, 20)


def median_seconds(run: Callable, times: int) -> float:
    """Median CPU seconds of a call."""
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def memory_of(method: str, steps: int) -> float:
    """Peak memory growth (MiB) of 20 outer steps, in a process of its own; repeats differ by a few MiB."""
    command = [sys.executable, __file__, "--measure", method, str(steps)]
    return round(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout), 1)


def measure(method: str, steps: int) -> None:
    """Print the growth of the peak: 25 tasks of 10 support and 10 query points, after a run that warms all up."""

    def sample(tasks: int) -> Callable[[torch.Generator], Tasks]:
        return lambda g: Sinusoids().sample(tasks, shots=10, queries=10, generator=g)

    def run(tasks: int, learner: object) -> None:
        meta_train(ALGORITHMS[method], learner, sample(tasks), 20, theta=sinusoids.initial(0), progress=False)

    run(2, sinusoids.learner(1e-4, 1))
    before = peak()
    run(sinusoids.META_BATCH, sinusoids.learner(1e-4, steps))
    print(peak() - before)


def peak() -> float:
    """The most memory this process has held, in MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def costs() -> dict:
    """CPU seconds and memory of meta-training, CPU seconds per new task."""
    outer, inner = seconds()
    found = {}
    for method, name in RECIPES.items():
        iterations = json.loads((results.ROOT / "weights" / f"{name}.json").read_text("utf-8"))["iterations"]
        found[method] = {
            "seconds": float(f"{outer[method] * iterations:.3g}"),
            "iterations": iterations,
            "tasks_seen": iterations * sinusoids.META_BATCH,
            "memory": {str(steps): memory_of(method, steps) for steps in (1, 10, 40)},
        }
        print(method, found[method], flush=True)
    return {"meta_training": found, "per_task": inner}


def main() -> None:
    """Train, tune, score, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("_build/recreate"))
    parser.add_argument("--measure", nargs=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        return measure(arguments.measure[0], int(arguments.measure[1]))
    cache, entries, choices = arguments.cache, [], {"Adam from scratch": [], "Gaussian process": []}
    tuning = [tune(method, trained(method, 0, cache)) for method in ALGORITHMS]
    for shots in SHOTS:
        for seed in SEEDS:
            for method, rate in ((t["method"], t["chosen"]) for t in tuning):
                entries.append(adapted(method, trained(method, seed, cache), rate, shots, seed))
            for method, run in (("Gaussian process", tuned_process), ("Adam from scratch", tuned_adam)):
                found, chosen = remembered(cache / f"{run.__name__}-{shots}-{seed}.json", partial(run, shots, seed))
                entries.append(found)
                choices[method] += chosen
            print(*((e["method"], e["shots"], e["seed"], e["mean"]) for e in entries[-6:]), sep="\n", flush=True)
    tuning += [tuning_of(method, chosen) for method, chosen in choices.items()]
    content = {"tasks": TASKS, "queries": 100} | costs() | {"tuning": tuning, "entries": entries}
    results.write(HERE / "costs.json", "python book/09-faq/results/costs.py", depends(), content)


if __name__ == "__main__":
    main()
