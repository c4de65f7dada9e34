"""The tables of "MAML from scratch": `python book/05-practice/results/sinusoids.py [--cache DIR]`.

MAML and FOMAML use the inner rate of the paper, 0.01; every baseline gets three trials on 200 validation tasks.
All are trained with three seeds and scored on 600 test tasks of 100 query points at 5, 10 and 20 shots. About 15 CPU
minutes.
"""

import argparse
import base64
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from metalearn_utils import Scores, Tasks, Trained, evaluate, results
from metalearn_utils.recipes import sinusoids
from metalearn_utils.recreate import recreate
from metalearn_utils.rules import Params
from metalearn_utils.tasks.sinusoids import Sinusoids
from metalearn_utils.train import DivergedError

HERE = Path(__file__).parent
SEEDS, SHOTS, TASKS, STEPS = (0, 1, 2), (5, 10, 20), 600, 10
RATES = {
    "Reptile": (0.001, 0.003, 0.01),
    "joint training": (0.0003, 0.001, 0.003),
    "from scratch": (0.0001, 0.0003, 0.001),
}
TRIAL, LARGE = 5000, 100.0


def depends() -> list[Path]:
    """The files that the tables depend on."""
    package = results.ROOT
    code = [package / name for name in ("recipes/sinusoids.py", "models.py", "tasks/sinusoids.py")]
    return [*code, Path(__file__), *sorted((package / "weights").glob("sinusoid-*.pt"))]


def test_tasks(shots: int, tasks: int = TASKS, seed: int = 100) -> Tasks:
    """Fixed tasks with 100 query points each."""
    return Sinusoids().sample(tasks, shots=shots, queries=100, generator=torch.Generator().manual_seed(seed))


def trained(name: str, seed: int, cache: Path) -> Params:
    """The stored (float32) weights of one recipe and seed, as float64; trained now unless the cache has them."""
    folder = cache / f"seed{seed}"
    if not (folder / f"{name}.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        recreate(name, seed, folder, folder / f"{name}.ckpt")
    return {k: v.double() for k, v in torch.load(folder / f"{name}.pt", weights_only=True).items()}


def score(theta: Params, lr: float, tasks: Tasks) -> Scores:
    """Mean squared error after 0, 1, ..., 10 steps of rate `lr`."""
    return evaluate(sinusoids.learner(lr, STEPS), theta, tasks, metric="mse")


def tune(joint_theta: Params) -> list[dict]:
    """Three trials per baseline on 200 validation tasks, judged by the error after 10 steps."""
    tasks = test_tasks(10, 200, seed=200)
    reptiles = [attempt(partial(sinusoids.train_reptile, 0, TRIAL), lr) for lr in RATES["Reptile"]]
    thetas = {
        "Reptile": reptiles,
        "joint training": [joint_theta] * 3,
        "from scratch": [sinusoids.initial(0)] * 3,
    }
    return [trial(method, RATES[method], found, tasks) for method, found in thetas.items()]


def attempt(run: Callable[..., Trained], rate: float) -> Params | None:
    """One short training run at an inner rate, or None if it diverges."""
    try:
        return run(inner_lr=rate, progress=False).theta
    except DivergedError:
        return None


def trial(method: str, rates: tuple, thetas: list[Params | None], tasks: Tasks) -> dict:
    """The record of one method's trials."""
    errors = [theta and score(theta, lr, tasks).mean[-1].item() for theta, lr in zip(thetas, rates)]
    errors = [e if e is not None and e < LARGE else None for e in errors]
    best = min((e, lr) for e, lr in zip(errors, rates) if e is not None)[1]
    return {"method": method, "rates": list(rates), "errors": [e and float(f"{e:.4g}") for e in errors], "chosen": best}


def entry(method: str, shots: int, seed: int, lr: float, found: Scores) -> dict:
    """Mean, interval and median at every step, how many tasks diverge, and each task's error after the last step.

    Means and medians that are not finite or above 100 are stored as null; per-task errors as float32 in base64.
    """
    columns = {"mean": found.mean, "half": found.interval, "median": found.per_task.median(1).values}
    about = {"method": method, "shots": shots, "seed": seed, "lr": lr}
    about |= {name: [tidy(v) for v in values.tolist()] for name, values in columns.items()}
    last = found.per_task[-1]
    about["diverged"] = int((~(last < LARGE)).sum())
    return about | {"last": base64.b64encode(last.float().numpy().tobytes()).decode()}


def tidy(value: float) -> float | None:
    """Five digits, or null for an error that says no more than "it diverges"."""
    return float(f"{value:.5g}") if value < LARGE else None


def main() -> None:
    """Tune, train, score, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("_build/recreate"))
    cache = parser.parse_args().cache
    torch.set_num_threads(1)
    tuning = tune(trained("sinusoid-joint", 0, cache))
    chosen = {t["method"]: t["chosen"] for t in tuning}
    entries = []
    for shots in SHOTS:
        tasks = test_tasks(shots)
        for seed in SEEDS:
            runs = {
                "MAML": (trained(f"sinusoid-maml-{shots}", seed, cache), 0.01),
                "FOMAML": (trained("sinusoid-fomaml", seed, cache), 0.01),
                "Reptile": (trained("sinusoid-reptile", seed, cache), chosen["Reptile"]),
                "joint training": (trained("sinusoid-joint", seed, cache), chosen["joint training"]),
                "joint training, usual rate": (trained("sinusoid-joint", seed, cache), 0.01),
                "from scratch": (sinusoids.initial(seed), chosen["from scratch"]),
            }
            for method, (theta, lr) in runs.items():
                entries.append(entry(method, shots, seed, lr, score(theta, lr, tasks)))
                print(method, shots, seed, entries[-1]["mean"], entries[-1]["diverged"], flush=True)
    content = {"tasks": TASKS, "queries": 100, "tuning": tuning, "entries": entries}
    results.write(HERE / "sinusoids.json", "python book/05-practice/results/sinusoids.py", depends(), content)


if __name__ == "__main__":
    main()
