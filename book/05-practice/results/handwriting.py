"""The tables of "From fonts to handwriting": `python book/05-practice/results/handwriting.py [--cache DIR]`.

Trains every method with seeds 0, 1 and 2 (about 30 CPU minutes; finished runs are reused from the cache folder),
chooses test-time settings on the validation scripts, and scores 600 tasks of the test scripts and of real alphabets.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from metalearn_utils import Learner, NearestNeighbour, Prototypes, Tasks, adam, cross_entropy, results
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
# Five trials for every method that has a setting at test time; no choice lies at an edge (a test looks).
RATES = {"from scratch": (0.003, 0.01, 0.03, 0.1, 0.3), "fine-tuned": (0.00003, 0.0001, 0.0003, 0.001, 0.003)}
STEPS = {"MAML": (1, 3, 5, 10, 20), "FOMAML": (3, 5, 10, 20, 40)}
FINE_STEPS, TOGETHER = 20, 6
# The page computes MAML again in float64; Adam's twenty steps in float32 take half the time.
SINGLE = ("from scratch", "fine-tuned")


def depends() -> list[Path]:
    """The files that the tables depend on: code, data and shipped weights."""
    package = results.ROOT
    code = [package / name for name in ("recipes/fonts.py", "models.py", "prototypes.py", "tasks/images.py")]
    code += [package / "tasks/glyphs.py", package / "tasks/omniglot.py", Path(__file__)]
    folder = omniglot.find_folder() or omniglot.cache_folder()
    data = [glyphs.DATA, *(folder / name for name in omniglot.ARCHIVES)]
    return code + data + sorted((package / "weights").glob("fonts-*.pt"))


def trained(name: str, seed: int, cache: Path) -> Params:
    """The weights of one recipe and seed, trained now unless the cache has them."""
    folder = cache / f"seed{seed}"
    if not (folder / f"{name}.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        recreate(name, seed, folder, folder / f"{name}.ckpt")
    return torch.load(folder / f"{name}.pt", weights_only=True)


def fine_tuner(lr: float) -> Learner:
    """The whole network trained on the support set by Adam, as practitioners fine-tune."""
    return Learner(fonts.network(fonts.WAYS), cross_entropy, adam(lr), FINE_STEPS)


def with_head(theta: Params) -> Params:
    """A pretrained embedding under a head of zeros."""
    fresh = params_of(fonts.network(fonts.WAYS))
    head = {name: torch.zeros_like(v) for name, v in fresh.items() if name.startswith("head.")}
    return theta | head


def methods(seed: int, shots: int, cache: Path) -> dict[str, tuple[object, Params, tuple]]:
    """Every method as (learner, theta, settings to choose from on the validation scripts)."""
    maml = trained(f"fonts-maml-{shots}shot", seed, cache)
    pretrained, proto = trained("fonts-pretrained", seed, cache), trained("fonts-prototypes", seed, cache)
    scratch = params_of(fonts.network(fonts.WAYS, seed))
    centroid = Prototypes(fonts.network(None), metric="cosine")
    fine = {name: [fine_tuner(lr) for lr in rates] for name, rates in RATES.items()}
    found = {
        "pixels": (NearestNeighbour(nn.Flatten()), {}, ()),
        "from scratch": (fine["from scratch"][0], scratch, fine["from scratch"]),
        "fine-tuned": (fine["fine-tuned"][0], with_head(pretrained), fine["fine-tuned"]),
        "pretrained": (centroid, pretrained, ()),
        "MAML": (fonts.maml_learner(), maml, [replace(fonts.maml_learner(), steps=k) for k in STEPS["MAML"]]),
        "feature reuse": (centroid, fonts.without_head(maml), ()),
        "prototypes": (fonts.prototype_learner(), proto, ()),
    }
    if shots == 1:
        options = [replace(fonts.fomaml_learner(), steps=k) for k in STEPS["FOMAML"]]
        found["FOMAML"] = (options[0], trained("fonts-fomaml-1shot", seed, cache), options)
    return found


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


def choose(learner: object, theta: Params, options: tuple, shots: int) -> tuple[object, dict]:
    """The option with the best accuracy on 100 tasks of the validation scripts, and what was tried."""
    if not options:
        return learner, {}
    tasks = fonts.tasks_of(glyphs.Glyphs("val"), 100, shots, seed=3, dtype=dtype_of(theta))
    tried = [correct(option, theta, tasks)[True].double().mean().item() * 4 for option in options]
    best = max(range(len(options)), key=tried.__getitem__)
    return options[best], {"tried": [describe(o) for o in options], "accuracy": [round(t, 2) for t in tried]}


def dtype_of(theta: Params) -> torch.dtype:
    """The precision of a method's parameters; float64 for a method without any."""
    return next((value.dtype for value in theta.values()), torch.float64)


def describe(learner: Learner) -> str:
    """The setting that distinguishes an option."""
    return f"{learner.steps} steps at rate {float(learner.rule.phi['lr']):g}"


def score(shots: int, seed: int, cache: Path) -> tuple[list[dict], list[dict]]:
    """All methods of one number of shots and one seed: table entries, and what was tried."""
    torch.set_num_threads(1)
    families = {"glyphs": glyphs.Glyphs("test"), "real": omniglot.Omniglot(REAL)}
    entries, tuning = [], []
    for method, (learner, theta, options) in methods(seed, shots, cache).items():
        theta = {name: value.to(torch.float32 if method in SINGLE else torch.float64) for name, value in theta.items()}
        learner, tried = choose(learner, theta, options, shots)
        about = {"method": method, "shots": shots, "seed": seed}
        tuning += [about | {"chosen": describe(learner)} | tried] if tried else []
        for family, images in families.items():
            part = fonts.tasks_of(images, TASKS, shots, TEST_SEED, dtype_of(theta))
            for mode, right in correct(learner, theta, part).items():
                entries.append(about | {"data": family, "transductive": mode, "correct": results.encode(right)})
                print(method, shots, seed, family, mode, f"{4 * right.double().mean():.1f}", flush=True)
    return entries, tuning


def main() -> None:
    """Train, choose, score, store; two processes side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("_build/recreate"))
    cache = parser.parse_args().cache
    jobs = [(shots, seed) for seed in SEEDS for shots in (1, 5)]
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(score, *zip(*jobs), [cache] * len(jobs)))
    entries, tuning = (sum(lists, []) for lists in zip(*found))
    content = {"tasks": TASKS, "test_seed": TEST_SEED, "alphabets": REAL, "tuning": tuning, "entries": entries}
    command = "python book/05-practice/results/handwriting.py"
    results.write(HERE / "handwriting.json", command, depends(), content)


if __name__ == "__main__":
    main()
