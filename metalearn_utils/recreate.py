"""Make the shipped weights again: `python -m metalearn_utils.recreate NAME [--seed 0] [--folder DIR]`."""

import argparse
from pathlib import Path

import torch

from .recipes import EXACT, RECIPES
from .recipes.fonts import without_head
from .rule_files import save_rule
from .runs import Trained
from .weights import FOLDER, RULE, save_weights, write_record

REPEATED = 50


def recreate(name: str, seed: int = 0, folder: Path = FOLDER, checkpoint: Path | None = None) -> Trained:
    """Run the recipe `name` and store its weights and record in `folder`.

    Args:
        name: one of `RECIPES`.
        seed: seed of the initial weights and of the tasks; the shipped weights have seed 0.
        folder: where NAME.pt and NAME.json go.
        checkpoint: file to save to and to resume from.
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {sorted(RECIPES)}, got {name!r}")
    torch.set_num_threads(1)
    trained = RECIPES[name](seed, checkpoint=checkpoint)
    store(name, seed, trained, folder)
    return trained


def store(name: str, seed: int, trained: Trained, folder: Path = FOLDER) -> None:
    """Write the result of a recipe and its record; a learned rule NAME of seed s is stored as NAME-s<s>."""
    found = record(name, seed, trained)
    if name.startswith(RULE):
        recipe = RECIPES[name]
        rule = recipe.untrained(seed)._replace(phi=trained.theta)
        save_rule(folder / f"{name}-s{seed}.pt", rule, recipe.kind.__name__, **recipe.config)
        write_record(f"{name}-s{seed}", found, folder)
    else:
        theta = without_head(trained.theta) if name == "fonts-pretrained" else trained.theta
        save_weights(name, theta, found, folder)


def record(name: str, seed: int, trained: Trained) -> dict:
    """What is stored beside the weights."""
    losses = trained.losses[:REPEATED] if name.startswith(RULE) else first_losses(name, seed)
    skipped = {"skipped": trained.skipped} if trained.skipped else {}
    return skipped | {
        "command": f"python -m metalearn_utils.recreate {name} --seed {seed}",
        "seed": seed,
        "iterations": len(trained.losses),
        "cpu_seconds": round(trained.seconds, 1),
        "first_losses": [float(f"{loss:.6g}") for loss in losses],
        "validation": [[i, round(score, 2)] for i, score in trained.validation],
    }


def first_losses(name: str, seed: int = 0) -> list[float]:
    """The losses of the recipe's first 50 iterations in float64, in which machines agree until a rounding has grown."""
    return EXACT[name](seed, stop=REPEATED, progress=False).losses


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    trained = recreate(args.name, args.seed, args.folder, args.checkpoint)
    print(f"{args.name}: {len(trained.losses)} iterations in {trained.seconds:.0f} CPU seconds")


if __name__ == "__main__":
    main()
