"""What helps a learned optimizer away from its tasks: `python book/03-algorithm/results/shifts.py [--cache DIR]`.

One network per parameter, `per_parameter_mlp`, is meta-trained on least squares in 10 dimensions in five ways that differ
in the estimator or in what the network sees, three seeds each, and judged on tasks like those, on longer runs and in more
dimensions; beside it momentum and Adam, tuned on the meta-training tasks and on the shifted ones. About 5 CPU minutes on one thread;
finished trainings are kept in the cache, so that an interrupted run goes on.
"""

import argparse
import base64
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from metalearn_utils import results
from metalearn_utils.baselines import Method, baselines
from metalearn_utils.coordinatewise import per_parameter_mlp
from metalearn_utils.episodes import train_rule
from metalearn_utils.estimators import Carry, Estimate, MetaLoss, pes, truncated
from metalearn_utils.judging import judge, trajectory
from metalearn_utils.recipes.fonts import cosine
from metalearn_utils.rules import Params, Phi, UpdateRule
from metalearn_utils.tasks.problems import LeastSquares, Problem
from metalearn_utils.tuning import tune

HERE = Path(__file__).resolve().parent
TASKS, FIRST, SEEDS, TRIALS, ITERATIONS = 640, 100, (0, 1, 2), 16, 600
HORIZON, WINDOW, HORIZONS = 100, 20, (20, 40, 80, 160, 320)
LOG = MetaLoss(log=True)
# Of every setting: steps, dimensions.
SETTINGS = {"like meta-training": (100, 10), "5 times as long": (500, 10), "20 dimensions": (100, 20)}


def random_horizons() -> Callable[..., Estimate]:
    """PES on runs whose length is drawn anew at the start of each run."""
    made, now = [pes(WINDOW, horizon, 4, 0.05, LOG) for horizon in HORIZONS], []

    def estimate(rule: UpdateRule, phi: Phi, problem: Problem, carry: Carry | None, generator: torch.Generator) -> Estimate:
        if carry is None:
            now[:] = [made[int(torch.randint(len(made), (), generator=generator))]]
        return now[0](rule, phi, problem, carry, generator)

    return estimate


# Of every variant: whether the network sees the time, and the estimator of the meta-gradient.
VARIANTS: dict[str, tuple[bool, Callable[..., Estimate]]] = {
    "PES": (True, pes(WINDOW, HORIZON, 4, 0.05, LOG)),
    "no time": (False, pes(WINDOW, HORIZON, 4, 0.05, LOG)),
    "random horizons": (True, random_horizons()),
    "both": (False, random_horizons()),
    "truncated": (True, truncated(WINDOW, HORIZON, LOG)),
}


def depends() -> list[Path]:
    """The files that the table depends on."""
    names = "adapt coordinatewise episodes estimators features judging population rates rules train tuning tasks/problems"
    return [Path(__file__).resolve(), *(results.ROOT / f"{name}.py" for name in names.split())]


def untrained(variant: str, seed: int) -> UpdateRule:
    """The rule of a variant before meta-training; that of seed 0 serves to hold a stored phi, too."""
    return per_parameter_mlp(base=0.1, use_time=VARIANTS[variant][0], generator=torch.Generator().manual_seed(seed))


def problem(setting: str, tasks: int, seed: int) -> Problem:
    """Tasks of a setting, with the score that they are judged by: "decades"."""
    found = LeastSquares(SETTINGS[setting][1]).sample(tasks, generator=torch.Generator().manual_seed(seed))
    start = found.loss(found.theta, found.data(0))

    def decades(params: Params) -> Tensor:
        """log10 of the last loss over the first, between -16 and 0: a run that ends above its start counts as 0."""
        return (found.loss(params, found.data(0)) / start).nan_to_num(1.0, 1.0).clamp(1e-16, 1.0).log10()

    return replace(found, scores={"decades": decades})


def meta_trained(variant: str, seed: int) -> tuple[UpdateRule, float]:
    """A rule after meta-training, its phi rounded to float32, and CPU seconds."""
    begun, rule = time.process_time(), untrained(variant, seed)
    trained = train_rule(rule, lambda g: LeastSquares(10).sample(16, generator=g), VARIANTS[variant][1], ITERATIONS,
                         lr=5e-3, schedule=cosine, seed=seed, progress=False)  # fmt: skip
    return rule._replace(phi={k: v.float().double() for k, v in trained.theta.items()}), time.process_time() - begun


def trained(variant: str, seed: int) -> dict:
    """The record of a meta-training, with phi in base64."""
    rule, seconds = meta_trained(variant, seed)
    return {"method": variant, "seed": seed, "seconds": round(seconds, 1), "phi": packed(rule.phi)}


def packed(phi: Phi) -> str:
    """phi as float32 in base64, its tensors one after the other."""
    return base64.b64encode(torch.cat([v.flatten() for v in phi.values()]).float().numpy().tobytes()).decode()


def unpacked(text: str, rule: UpdateRule) -> UpdateRule:
    """The rule with the phi that `packed` stored."""
    parts = results.floats(text).split([v.numel() for v in rule.phi.values()])
    return rule._replace(phi={k: part.reshape(v.shape) for part, (k, v) in zip(parts, rule.phi.items())})


def scores(rule: UpdateRule, setting: str) -> Tensor:
    """Decades of the test tasks of a setting, [tasks]; a run that leaves the finite numbers counts as 0."""
    drawn = problem(setting, TASKS, 1000)
    return judge("decades", drawn, *trajectory(rule, drawn, SETTINGS[setting][0])).clamp(max=0.0)


def entry(method: str, setting: str, seed: int, found: Tensor) -> dict:
    """Mean and interval over the tasks, the share that ended above the start, and the first 100 tasks' scores."""
    tidy = [float(f"{v:.5g}") for v in (found.mean().item(), 1.96 * found.std().item() / len(found) ** 0.5)]
    first = base64.b64encode(found[:FIRST].float().numpy().tobytes()).decode()
    about = {"method": method, "shots": setting, "seed": seed, "mean": tidy[0], "half": tidy[1]}
    return about | {"failed": round(100 * (found >= 0).double().mean().item(), 1), "first": first}


def hand_made() -> list[Method]:
    """The rivals, whose learning rate is tuned."""
    return [method for method in baselines(HORIZON) if method.name in ("momentum", "Adam")]


def rivals(setting: str, tuned_on: str, seed: int) -> tuple[list[dict], list[dict]]:
    """Entries and records of tuning of the hand-made optimizers: tuned on one setting, judged on another."""
    entries, tuning = [], []
    for method in hand_made():
        found = tune(method, problem(tuned_on, 64, seed), SETTINGS[tuned_on][0], "decades", TRIALS)
        name = method.name + (", retuned" if setting == tuned_on != "like meta-training" else "")
        entries.append(entry(name, setting, seed, scores(method.make(found.chosen), setting)))
        tidy = sorted(float(f"{v:.6g}") for v in found.values)
        tuning.append({"method": name, "on": tuned_on, "seed": seed, "tried": tidy, "chosen": float(f"{found.chosen:.6g}")})
    return entries, tuning


def main() -> None:
    """Meta-train, tune, judge, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("_build/shifts"))
    cache = parser.parse_args().cache
    torch.set_num_threads(1)
    entries, tuning, rules = [], [], []
    for seed in SEEDS:
        for variant in VARIANTS:
            path = cache / f"{variant}-{seed}.json".replace(" ", "-")
            rules.append(results.kept(path, depends(), lambda: trained(variant, seed)))
            rule = unpacked(rules[-1]["phi"], untrained(variant, seed))
            entries += [entry(variant, setting, seed, scores(rule, setting)) for setting in SETTINGS]
            print(seed, variant, *((e["shots"], e["mean"], e["failed"]) for e in entries[-3:]), flush=True)
        for setting in SETTINGS:
            for tuned_on in dict.fromkeys(("like meta-training", setting)):
                found = rivals(setting, tuned_on, seed)
                entries, tuning = entries + found[0], tuning + (found[1] if setting == tuned_on else [])
                print(seed, setting, tuned_on, *((e["method"], e["mean"], e["failed"]) for e in found[0]), flush=True)
    content = {"tasks": TASKS, "iterations": ITERATIONS, "tuning": tuning, "rules": rules, "entries": entries}
    results.write(HERE / "shifts.json", "python book/03-algorithm/results/shifts.py", depends(), content)


if __name__ == "__main__":
    main()
