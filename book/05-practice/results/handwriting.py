"""The tables of "From fonts to handwriting": `python book/05-practice/results/handwriting.py [--cache DIR]`.

Trains every method with seeds 0, 1 and 2, chooses test-time settings on the validation scripts, and scores 600 tasks
of the test scripts and of real alphabets: more than an hour of CPU time. Finished parts are reused from the cache.
"""

import argparse
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from metalearn_utils import Learner, NearestNeighbour, Prototypes, Tasks, adam, cross_entropy, results
from metalearn_utils.convnets import Blur
from metalearn_utils.evaluate import chunks
from metalearn_utils.models import params_of
from metalearn_utils.parallel import forward_of
from metalearn_utils.recipes import fonts
from metalearn_utils.recreate import recreate
from metalearn_utils.rules import Params
from metalearn_utils.tasks import glyphs, omniglot

HERE = Path(__file__).parent
SEEDS, TASKS, TEST_SEED = (0, 1, 2), 600, 2
REAL = ("Japanese_(katakana)", "Sanskrit", "Tagalog")
# Five trials for every method that has a setting at test time; no choice lies at an edge (a test looks). Among equal
# rates the largest is taken.
# Adam's twenty steps run in float32, which takes half the time; all else in float64, as the page computes MAML again.
RATES = {
    "from scratch": (0.3, 0.1, 0.03, 0.01, 0.003),
    "fine-tuned": (0.003, 0.001, 0.0003, 0.0001, 0.00003),
    "head only": (0.01, 0.003, 0.001, 0.0003, 0.0001),
}
# More inner steps never hurt here and help ever less: the fewest within half a point of the best trial are taken.
STEPS, ENOUGH = {"MAML": (1, 5, 10, 20, 40), "FOMAML": (3, 10, 20, 40, 80)}, 0.5
SIGMAS = (0.5, 1.0, 1.5, 2.0, 3.0)
FINE_STEPS, TOGETHER = 20, 6
PIXELS = ("pixels", "blurred pixels")
UNTRAINED = (*PIXELS, "from scratch")
RECIPES = {
    "FOMAML": "fonts-fomaml-1shot",
    "fine-tuned": "fonts-pretrained",
    "head only": "fonts-pretrained",
    "pretrained": "fonts-pretrained",
    "prototypes": "fonts-prototypes",
    "prototypes, 5 ways": "fonts-prototypes-5way",
}
METHODS = ("from scratch", "MAML", "feature reuse", *RECIPES, *PIXELS)


def depends() -> list[Path]:
    """The files that the tables depend on: code, data and shipped weights."""
    package = results.ROOT
    code = [package / name for name in ("recipes/fonts.py", "convnets.py", "prototypes.py", "tasks/images.py")]
    code += [package / "tasks/glyphs.py", package / "tasks/omniglot.py", Path(__file__)]
    folder = omniglot.find_folder() or omniglot.cache_folder()
    data = [glyphs.DATA, *(folder / name for name in omniglot.ARCHIVES)]
    return code + data + sorted((package / "weights").glob("fonts-*.pt"))


def trained(name: str, seed: int, cache: Path) -> Params:
    """The weights of one recipe and seed, trained now unless the cache has them."""
    folder = cache / f"seed{seed}"
    if not (folder / f"{name}.json").exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        recreate(name, seed, folder, folder / f"{name}.ckpt")
    return torch.load(folder / f"{name}.pt", weights_only=True)


def recipe_of(method: str, shots: int) -> str:
    """The recipe that trains a method's weights."""
    if method in ("MAML", "feature reuse"):
        return f"fonts-maml-{shots}shot"
    return RECIPES[method]


def with_head(theta: Params) -> Params:
    """A pretrained embedding under a head of zeros."""
    fresh = params_of(fonts.network(fonts.WAYS))
    head = {name: torch.zeros_like(v) for name, v in fresh.items() if name.startswith("head.")}
    return theta | head


def contenders(method: str, seed: int, shots: int, cache: Path) -> tuple[object, Params, list]:
    """One method as learner, theta, and the settings to choose from on the validation scripts."""
    centroid = Prototypes(fonts.network(None), metric="cosine")
    if method in PIXELS:
        options = [NearestNeighbour(Blur(sigma), metric="cosine") for sigma in SIGMAS]
        return (NearestNeighbour(nn.Flatten()), {}, []) if method == "pixels" else (options[0], {}, options)
    if method == "from scratch":
        return tuned(method, params_of(fonts.network(fonts.WAYS, seed)))
    theta = trained(recipe_of(method, shots), seed, cache)
    if method in RATES:
        return tuned(method, with_head(theta))
    if method in STEPS:
        learner = fonts.maml_learner() if method == "MAML" else fonts.fomaml_learner()
        return learner, theta, [replace(learner, steps=k) for k in STEPS[method]]
    if method == "feature reuse":
        return centroid, fonts.without_head(theta), []
    return (centroid if method == "pretrained" else fonts.prototype_learner()), theta, []


def tuned(method: str, theta: Params) -> tuple[Learner, Params, list[Learner]]:
    """Twenty steps of Adam on the support set: on all weights, as practitioners fine-tune, or on the head alone."""
    only = ("head.",) if method == "head only" else None
    model = fonts.network(fonts.WAYS)
    options = [Learner(model, cross_entropy, adam(lr), FINE_STEPS, adapt_only=only) for lr in RATES[method]]
    return options[0], theta, options


def correct(learner: object, theta: Params, tasks: Tasks) -> dict[bool, Tensor]:
    """Right answers per task, [tasks], with transductive normalisation and without; one adaptation serves both."""
    parts = [(part, predictions(learner, theta, part)) for part in chunks(tasks, TOGETHER)]
    return {mode: torch.cat([(found[mode] == p.query.y).sum(1) for p, found in parts]) for mode in (True, False)}


def predictions(learner: object, theta: Params, part: Tasks) -> dict[bool, Tensor]:
    """Predicted labels [tasks, queries] in both modes."""
    modes = {mode: replace(learner, transductive=mode) for mode in (True, False)}
    if not isinstance(learner, Learner):
        return {mode: m.predict(theta, part)[-1].argmax(-1) for mode, m in modes.items()}
    forward = forward_of(learner.model, learner.loss, part)
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    with torch.no_grad():
        for piece in forward.parts(part):
            params = learner.inner(forward, forward.start(theta, piece), piece.support, None).params
            for mode, m in modes.items():
                found[mode].append(m.query_outputs(forward, params, piece).argmax(-1))
    return {mode: (f[0] if forward.stacked else torch.stack(f)) for mode, f in found.items()}


def choose(learner: object, theta: Params, options: list, shots: int, enough: float) -> tuple[object, dict]:
    """The first option within `enough` points of the best on 100 tasks of the validation scripts; what was tried."""
    if not options:
        return learner, {}
    tasks = fonts.tasks_of(glyphs.Glyphs("val"), 100, shots, seed=3, dtype=dtype_of(theta))
    tried = [correct(option, theta, tasks)[True].double().mean().item() * 4 for option in options]
    chosen = next(option for option, accuracy in zip(options, tried) if accuracy >= max(tried) - enough)
    return chosen, {"tried": [describe(o) for o in options], "accuracy": [round(t, 2) for t in tried]}


def dtype_of(theta: Params) -> torch.dtype:
    """The precision of a method's parameters; float64 for a method without any."""
    return next((value.dtype for value in theta.values()), torch.float64)


def describe(option: object) -> str:
    """The setting that distinguishes an option."""
    if isinstance(option, NearestNeighbour):
        return f"sigma {option.model.sigma:g}"
    return f"{option.steps} steps at rate {float(option.rule.phi['lr']):g}"


def score(job: tuple[str, int, int], cache: Path) -> dict:
    """Table entries of one (method, shots, seed), and what was tried; kept in the cache until anything changes."""
    method, shots, seed = job
    path = cache / "scores" / state() / f"{method}-{shots}-{seed}.json".replace(" ", "-")
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    learner, theta, options = contenders(method, seed, shots, cache)
    theta = {name: value.to(torch.float32 if method in RATES else torch.float64) for name, value in theta.items()}
    learner, tried = choose(learner, theta, options, shots, ENOUGH if method in STEPS else 0.0)
    about = {"method": method, "shots": shots, "seed": seed}
    found = {"tuning": [about | {"chosen": describe(learner)} | tried] if tried else [], "entries": []}
    for family, images in {"glyphs": glyphs.Glyphs("test"), "real": omniglot.Omniglot(REAL)}.items():
        part = fonts.tasks_of(images, TASKS, shots, TEST_SEED, dtype_of(theta))
        for mode, right in correct(learner, theta, part).items():
            found["entries"].append(about | {"data": family, "transductive": mode, "correct": results.encode(right)})
            print(*job, family, mode, f"{4 * right.double().mean():.1f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(found), "utf-8")
    path.with_suffix(".tmp").replace(path)
    return found


def state() -> str:
    """A name for the present state of all that the scores depend on."""
    return hashlib.sha256(repr(results.fingerprint(depends())).encode()).hexdigest()[:16]


def main() -> None:
    """Train, choose, score, store; two processes side by side, the slowest jobs first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("_build/recreate"))
    cache = parser.parse_args().cache
    jobs = [(m, k, seed) for k in (5, 1) for m in METHODS for seed in SEEDS if not (m in PIXELS and seed)]
    jobs = [(m, k, seed) for m, k, seed in jobs if (m, k) != ("FOMAML", 5)]
    runs = {(recipe_of(m, k), seed) for m, k, seed in jobs if m not in UNTRAINED}
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(trained, *zip(*sorted(runs)), [cache] * len(runs)))
        found = list(pool.map(score, jobs, [cache] * len(jobs)))
    entries, tuning = (sum((f[part] for f in found), []) for part in ("entries", "tuning"))
    content = {"tasks": TASKS, "test_seed": TEST_SEED, "alphabets": REAL, "tuning": tuning, "entries": entries}
    command = "python book/05-practice/results/handwriting.py"
    results.write(HERE / "handwriting.json", command, depends(), content)


if __name__ == "__main__":
    main()
