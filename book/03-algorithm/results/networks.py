"""The tables of "A network per parameter": `python book/03-algorithm/results/networks.py [--cache DIR]`.

Ten hand-made optimizers, each tuned by 12 trials for the metric that is shown, against the shipped per-parameter MLP
and coordinatewise LSTM (three meta-training seeds each), over 100 steps.
Digits: 8 training runs with unseen initial weights.
Glyphs: 8 with unseen initial weights on characters of the training scripts, and 8 on characters of the test scripts.
Every method is tuned on 8 further runs (Glyphs: on training scripts). About 4 CPU minutes on one thread; finished parts
are kept in the cache, so that an interrupted run goes on.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from metalearn_utils import results
from metalearn_utils.baselines import baselines
from metalearn_utils.compare import Row, compare
from metalearn_utils.judging import judge, trajectory
from metalearn_utils.rule_files import load_rule
from metalearn_utils.tasks.base import Batch
from metalearn_utils.tasks.networks import Digits, GlyphClasses, classification
from metalearn_utils.tasks.problems import Problem

HERE = Path(__file__).parent
STEPS, TRIALS, TASKS, SEEDS = 100, 12, 8, (0, 1, 2)
METRICS = {"digits": ("training loss", "test accuracy", "mean"), "glyphs": ("training loss", "test accuracy")}
RULES = {"learned MLP": "mlp", "learned LSTM": "lstm"}


def depends() -> list[Path]:
    """The files that the tables depend on."""
    names = [f"rule-{family}-{kind}-s{s}" for family in METRICS for kind in RULES.values() for s in SEEDS]
    code = ("baselines.py", "compare.py", "coordinatewise.py", "judging.py", "rates.py", "rules.py", "tuning.py")
    code += ("tasks/glyphs.py", "tasks/networks.py")
    files = [*code, *(f"weights/{name}.pt" for name in names)]
    return [*(results.ROOT / name for name in files), Path(__file__)]


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def problems(family: str) -> tuple[Problem, Problem]:
    """The tasks to tune on and those to judge on; for Glyphs the second half of the latter has unseen classes."""
    if family == "digits":
        return Digits().sample(TASKS, generator=seeded(1000)), Digits().sample(TASKS, generator=seeded(2000))
    train, test = GlyphClasses("train"), GlyphClasses("test")
    return train.sample(TASKS, generator=seeded(1000)), side_by_side(train, test, seeded(2000))


def side_by_side(one: GlyphClasses, other: GlyphClasses, generator: torch.Generator) -> Problem:
    """`TASKS` tasks of each, as one problem."""
    drawn = [f.glyphs.sample(TASKS, ways=f.ways, shots=15, queries=5, generator=generator) for f in (one, other)]
    pairs = [(torch.cat([small(a.x), small(b.x)]), torch.cat([a.y, b.y])) for a, b in zip(*drawn)]
    train, test = (Batch(x.double(), y) for x, y in pairs)
    return classification(one.model, train, test, one.batch, generator)


def small(x: Tensor) -> Tensor:
    """[tasks, n, 1, 28, 28] -> [tasks, n, 196], means of 2 x 2 pixels, as `GlyphClasses` has them."""
    return torch.nn.functional.avg_pool2d(x.flatten(0, 1), 2).reshape(*x.shape[:2], -1)


def tuned(family: str, metric: str) -> list[dict]:
    """The entries of the hand-made optimizers."""
    rows = compare(baselines(STEPS), {}, *problems(family), STEPS, metric, TRIALS).rows
    return [entry(family, metric, row) for row in rows.values()]


def entry(family: str, metric: str, row: Row) -> dict:
    """One method's trials, choice, scores [1, tasks] and per-task oracle."""
    (t,) = row.tuned
    about = {"family": family, "metric": metric, "method": row.name}
    about |= {"tried": short(t.values), "tuning": short(t.scores)}
    about |= {"chosen": short(t.chosen), "edge": t.edge}
    return about | {"scores": short(row.scores.tolist()), "oracle": short(row.oracle.tolist())}


def learned(family: str, name: str) -> list[dict]:
    """The entries of a learned rule, one for each metric: its scores [seeds, tasks]."""
    _, test = problems(family)
    runs = [trajectory(load_rule(f"rule-{family}-{RULES[name]}-s{seed}"), test, STEPS) for seed in SEEDS]
    scores = {metric: torch.stack([judge(metric, test, *run) for run in runs]) for metric in METRICS[family]}
    return [{"family": family, "metric": m, "method": name, "scores": short(s.tolist())} for m, s in scores.items()]


def short(value: float | list) -> float | list | None:
    """Eight digits; null where it is not finite."""
    if isinstance(value, list):
        return [short(v) for v in value]
    return float(f"{value:.8g}") if math.isfinite(value) else None


def main() -> None:
    """Tune, judge, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("_build/networks"))
    cache = parser.parse_args().cache
    torch.set_num_threads(1)
    entries = []
    for family, metrics in METRICS.items():
        for metric in metrics:
            entries += results.kept(cache / f"{family}-{metric}.json", depends(), lambda: tuned(family, metric))
            print(family, metric, flush=True)
        for name in RULES:
            entries += results.kept(cache / f"{family}-{name}.json", depends(), lambda: learned(family, name))
            print(family, name, flush=True)
    content = {"tasks": TASKS, "trials": TRIALS, "steps": STEPS, "entries": entries}
    results.write(HERE / "networks.json", "python book/03-algorithm/results/networks.py", depends(), content)


if __name__ == "__main__":
    main()
