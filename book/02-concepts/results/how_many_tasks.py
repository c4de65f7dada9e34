"""The tables of "How many tasks?": `python book/02-concepts/results/how_many_tasks.py`.

Sinusoids: MAML and joint training on 1 to 256 stored tasks with 20 or 320 points each, and on new tasks at every
iteration. Glyphs: MAML on 100 characters whose labels are fixed, or shuffled for every task, at four inner rates. Every
method gets four trials of its inner rate on validation tasks (joint training for every pool); all have three seeds.
About 15 CPU minutes.
"""

import base64
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn_utils import Batch, Learner, Scores, Tasks, cross_entropy, evaluate, joint, maml, meta_train, mlp, mse
from metalearn_utils import params_of, results, sgd
from metalearn_utils.rules import Params
from metalearn_utils.tasks.glyphs import Glyphs
from metalearn_utils.tasks.sinusoids import Sinusoids, least_squares
from metalearn_utils.train import DivergedError

HERE = Path(__file__).parent
COMMAND = "python book/02-concepts/results/how_many_tasks.py"
SEEDS, SHOTS, TEST = (0, 1, 2), 10, 600
FRESH, POOLS, POINTS = 0, (1, 2, 4, 8, 16, 64, 256), (20, 320)
ITERATIONS, OUTER_LR, META_BATCH = 5000, 0.003, 25
CLASSES, GLYPH_ITERATIONS, GLYPH_LR, GLYPH_BATCH, WAYS = 100, 1500, 0.002, 8, 5
RATES = {
    "MAML": (0.001, 0.003, 0.01, 0.03),
    "joint training": (0.0003, 0.001, 0.003, 0.01),
    "from scratch": (0.0001, 0.0003, 0.001, 0.003),
    "fixed labels": (0.3, 1.0, 3.0, 10.0),
    "shuffled labels": (0.3, 1.0, 3.0, 10.0),
}
LARGE = 100.0
KEPT = (2, 20, 0)  # pool, points and seed of the run whose last parameters are stored


def depends() -> list[Path]:
    """The files that the tables depend on."""
    names = ("models.py", "tasks/sinusoids.py", "tasks/glyphs.py", "tasks/data/glyphs.npz")
    return [*(results.ROOT / name for name in names), Path(__file__)]


def seeded(seed: int) -> torch.Generator:
    """A generator with this seed."""
    return torch.Generator().manual_seed(seed)


# Sinusoids.


def test_tasks(tasks: int = TEST, seed: int = 100) -> Tasks:
    """Fixed new tasks with 100 query points each; seed 100 for the test, 200 for validation."""
    return Sinusoids().sample(tasks, shots=SHOTS, queries=100, generator=seeded(seed))


def pool_of(tasks: int, points: int, seed: int) -> Batch:
    """The meta-training data: x and y of shape [tasks, points, 1]. Smaller pools are the beginnings of larger ones."""
    whole = Sinusoids().sample(max(POOLS), shots=max(POINTS), queries=1, generator=seeded(1000 + seed)).support
    return Batch(whole.x[:tasks, :points], whole.y[:tasks, :points])


def episodes(pool: Batch, tasks: int, generator: torch.Generator) -> Tasks:
    """Tasks drawn from the pool with replacement: ten of a task's points as support set, ten others as query set."""
    which = torch.randint(len(pool.x), (tasks,), generator=generator)
    rows = torch.rand(tasks, pool.x.shape[1], generator=generator).argsort(1)[:, : 2 * SHOTS]
    x, y = (t[which[:, None], rows] for t in pool)
    return Tasks(Batch(x[:, :SHOTS], y[:, :SHOTS]), Batch(x[:, SHOTS:], y[:, SHOTS:]))


def renewed(pool: Batch, tasks: int, generator: torch.Generator) -> Tasks:
    """Tasks of the pool with points that nobody has seen: the waves are read off the pool's points by least squares."""
    which = torch.randint(len(pool.x), (tasks,), generator=generator)
    support = Batch(pool.x[which], pool.y[which])
    x = 10 * torch.rand(tasks, SHOTS + 100, 1, generator=generator, dtype=torch.float64) - 5
    y = least_squares(support, x)
    return Tasks(Batch(x[:, :SHOTS], y[:, :SHOTS]), Batch(x[:, SHOTS:], y[:, SHOTS:]))


def sampler(pool: int, points: int, seed: int) -> Callable[[torch.Generator], Tasks]:
    """What meta-training draws from: a pool, or new tasks every time."""
    if pool == FRESH:
        return lambda g: Sinusoids().sample(META_BATCH, shots=SHOTS, queries=SHOTS, generator=g)
    return partial(episodes, pool_of(pool, points, seed), META_BATCH)


def learner(rate: float, steps: int = 1) -> Learner:
    """The network of Finn et al. (2017), section 5.1, with gradient descent."""
    return Learner(mlp((1, 40, 40, 1)), mse, sgd(rate), steps)


def initial(seed: int) -> Params:
    """Initial parameters in float64."""
    return params_of(mlp((1, 40, 40, 1), generator=seeded(seed)), torch.float64)


def train(algorithm: Callable, rate: float, pool: int, points: int, seed: int, watch: Callable | None = None):
    """Meta-train for 5,000 iterations; `watch` is called ten times on the way, and the best by it is returned."""
    return meta_train(algorithm, learner(rate), sampler(pool, points, seed), ITERATIONS, theta=initial(seed),
                      lr=OUTER_LR, seed=seed, progress=False, validate=watch, every=ITERATIONS // 10)  # fmt: skip


def score(theta: Params, rate: float, tasks: Tasks, steps: int) -> Scores:
    """Mean squared error after 0, 1, ... steps."""
    return evaluate(learner(rate, steps), theta, tasks, metric="mse")


def maml_run(rate: float, pool: int, points: int, seed: int) -> dict:
    """One entry: errors on the pool's own points, on new points of its tasks and on new tasks, all after one step."""
    data = pool_of(pool or max(POOLS), points, seed)
    seen = episodes(data, 200, seeded(300)) if pool else sampler(FRESH, 0, 0)(seeded(300))
    validation, history, kept = test_tasks(200, seed=200), [], {}

    def watch(theta: Params, phi: None) -> float:
        errors = [score(theta, rate, tasks, 1).mean[1].item() for tasks in (seen, validation)]
        history.append([(len(history) + 1) * ITERATIONS // 10, *map(tidy, errors)])
        kept["last"] = {name: value.clone() for name, value in theta.items()}
        return -errors[1]

    best = train(maml, rate, pool, points, seed, watch).theta
    found = entry("MAML", pool, points, seed, rate, score(kept["last"], rate, test_tasks(), 10), 1)
    if (pool, points, seed) == KEPT:
        found["parameters"] = packed(torch.cat([v.flatten() for v in kept["last"].values()]))
    if pool:
        parts = {"seen": episodes(data, TEST, seeded(301)), "new_points": renewed(data, TEST, seeded(302))}
        found |= {name: tidy(score(kept["last"], rate, t, 1).mean[1].item()) for name, t in parts.items()}
    return found | {"early": tidy(score(best, rate, test_tasks(), 1).mean[1].item()), "history": history}


def joint_runs(pool: int) -> tuple[dict, list[dict]]:
    """Joint training on a pool, then ten steps: the trials of its rate, judged by three seeds, and its entries."""
    thetas, tasks = [train(joint, 0.01, pool, 20, seed).theta for seed in SEEDS], test_tasks(200, seed=200)
    means = [[score(t, rate, tasks, 10).mean[10].item() for t in thetas] for rate in RATES["joint training"]]
    found = choose("joint training", [sum(errors) / len(errors) for errors in means]) | {"pool": pool}
    rate = found["chosen"]
    scores = [score(theta, rate, test_tasks(), 10) for theta in thetas]
    return found, [entry("joint training", pool, 20, seed, rate, s, 10) for seed, s in zip(SEEDS, scores)]


def entry(method: str, pool: int, points: int, seed: int, rate: float, found: Scores, step: int) -> dict:
    """Mean and median at every step, and each task's error after the step that counts (float32 in base64)."""
    about = {"method": method, "shots": SHOTS, "pool": pool, "points": points, "seed": seed, "lr": rate, "step": step}
    columns = {"mean": found.mean, "median": found.per_task.median(1).values}
    about |= {name: [tidy(v) for v in values.tolist()] for name, values in columns.items()}
    return about | {"last": packed(found.per_task[step])}


def packed(values: Tensor) -> str:
    """Numbers as float32 in base64."""
    return base64.b64encode(values.float().numpy().tobytes()).decode()


def tidy(value: float) -> float | None:
    """Five digits, or null for an error that says no more than "it diverges"."""
    return float(f"{value:.5g}") if value < LARGE else None


# Glyphs.


def characters(split: str, classes: int | None = None, seed: int = 0) -> Tensor:
    """Characters at half the resolution, [classes, 20, 196] in float64; some of them if a number is given."""
    images = Glyphs(split).images
    if classes is not None:
        images = images[torch.randperm(len(images), generator=seeded(2000 + seed))[:classes]]
    return F.avg_pool2d(images.double() / 255, 2).flatten(2)


def labelled(images: Tensor, tasks: int, shuffle: bool, generator: torch.Generator) -> Tasks:
    """5-way 1-shot tasks: one character from each fifth of the classes, labelled by the fifth, or in random order."""
    per = len(images) // WAYS
    which = torch.randint(per, (tasks, WAYS), generator=generator) + per * torch.arange(WAYS)
    drawing = torch.rand(tasks, WAYS, images.shape[1], generator=generator).argsort(2)[..., :6]
    x, order = images[which[..., None], drawing], torch.rand(tasks, WAYS, generator=generator).argsort(1)
    y = (order if shuffle else torch.arange(WAYS).expand(tasks, WAYS))[..., None].expand(tasks, WAYS, 6)
    parts = [Batch(x[:, :, p].flatten(1, 2), y[:, :, p].flatten(1, 2).contiguous()) for p in (slice(1), slice(1, 6))]
    return Tasks(*parts)


def glyph_learner(rate: float) -> Learner:
    """A small fully connected network, one inner step."""
    return Learner(mlp((196, 64, 64, WAYS)), cross_entropy, sgd(rate), 1)


def glyph_train(rate: float, shuffle: bool, seed: int) -> Params | None:
    """Meta-train on a pool of characters; None if that diverges."""
    images = characters("train", CLASSES, seed)
    theta = params_of(mlp((196, 64, 64, WAYS), generator=seeded(seed)), torch.float64)
    sample = partial(labelled, images, GLYPH_BATCH, shuffle)
    try:
        return meta_train(maml, glyph_learner(rate), sample, GLYPH_ITERATIONS, theta=theta, lr=GLYPH_LR, seed=seed,
                          progress=False).theta  # fmt: skip
    except DivergedError:
        return None


def glyph_run(rate: float, shuffle: bool, seed: int) -> dict | None:
    """One entry: accuracy after 0, 1, ..., 10 steps on tasks of the training characters, validation and new ones."""
    if (theta := glyph_train(rate, shuffle, seed)) is None:
        return None
    tasks = {
        "seen": labelled(characters("train", CLASSES, seed), TEST, shuffle, seeded(301)),
        "validation": labelled(characters("val"), 200, True, seeded(200)),
        "mean": labelled(characters("test"), TEST, True, seeded(100)),
    }
    found = {name: evaluate(glyph_learner(rate), theta, part, steps=10) for name, part in tasks.items()}
    method = f"{'shuffled' if shuffle else 'fixed'} labels"
    about = {"method": method, "shots": 1, "pool": CLASSES, "seed": seed, "lr": rate, "step": 1}
    about |= {name: [round(v, 3) for v in f.mean.tolist()] for name, f in found.items()}
    return about | {"last": results.encode((found["mean"].per_task[1] / 4).round())}


# Tuning.


def tune() -> list[dict]:
    """Four trials per method on new sinusoids, seed 0."""
    tasks = test_tasks(200, seed=200)
    trials = {
        "MAML": lambda r: score(train(maml, r, FRESH, 20, 0).theta, r, tasks, 1).mean[1].item(),
        "from scratch": lambda r: score(initial(0), r, tasks, 10).mean[10].item(),
    }
    return [choose(method, [trial(rate) for rate in RATES[method]]) for method, trial in trials.items()]


def choose(method: str, errors: list[float | None]) -> dict:
    """The record of one method's trials; null stands for an error that says no more than "it diverges"."""
    errors = [tidy(math.nan if e is None else e) for e in errors]
    best = min((e, rate) for e, rate in zip(errors, RATES[method]) if e is not None)[1]
    print(method, errors, best, flush=True)
    return {"method": method, "rates": list(RATES[method]), "errors": errors, "chosen": best}


def sinusoid_entries(seed: int, rate: dict[str, float]) -> list[dict]:
    """All entries of one seed but those of joint training."""
    grid = [(FRESH, 20), *((m, 20) for m in POOLS), *((m, 320) for m in (4, 16, 64, 256))]
    scratch = score(initial(seed), rate["from scratch"], test_tasks(), 10)
    return [*(maml_run(rate["MAML"], m, n, seed) for m, n in grid),
            entry("from scratch", FRESH, 20, seed, rate["from scratch"], scratch, 10)]  # fmt: skip


def glyph_entries(seed: int) -> list[dict | None]:
    """All entries of one seed: fixed labels at four rates, shuffled labels at four rates."""
    return [glyph_run(r, shuffle, seed) for shuffle in (False, True) for r in RATES["shuffled labels"]]


def store(tuning: list[dict], sinusoids: list[dict], glyphs: list[dict | None]) -> None:
    """Choose the rates of the glyph runs by seed 0 on validation characters, after one step, and write the table."""
    errors = [e and 100 - e["validation"][1] for e in glyphs[:8]]
    tuning = [*tuning, choose("fixed labels", errors[:4]), choose("shuffled labels", errors[4:])]
    entries = [*sinusoids, *(e for e in glyphs if e is not None)]
    content = {"tasks": TEST, "tuning": tuning, "entries": entries}
    results.write(HERE / "how_many_tasks.json", COMMAND, depends(), content)


def main() -> None:
    """Tune, train, score, store."""
    torch.set_num_threads(1)
    tuning, sinusoids = tune(), []
    rate = {t["method"]: t["chosen"] for t in tuning}
    for pool in (FRESH, *POOLS):
        found, entries = joint_runs(pool)
        tuning, sinusoids = [*tuning, found], [*sinusoids, *entries]
    sinusoids += [e for seed in SEEDS for e in sinusoid_entries(seed, rate)]
    store(tuning, sinusoids, [e for seed in SEEDS for e in glyph_entries(seed)])


if __name__ == "__main__":
    main()
