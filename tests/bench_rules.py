"""Speed of meta-training learned optimizers, for `make bench`: the LSTM against a loop of backward() calls and JAX; ES, PES.

JAX is an extra for this benchmark alone (`pip install jax`); without it its line says so.
"""

import json
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from metalearn_utils.coordinatewise import lstm, per_parameter_mlp
from metalearn_utils.estimators import es, pes, run, truncated
from metalearn_utils.population import antithetic
from metalearn_utils.tasks.problems import LeastSquares, Problem

STEPS, WINDOW, TASKS = 100, 20, 128


def windows(rule, phi: dict, problem: Problem, estimator: Callable) -> list[dict]:
    """One meta-iteration of the library: the gradient of every window of a run."""
    carry, found = None, []
    while True:
        estimate = estimator(rule, phi, problem, carry, torch.Generator().manual_seed(0))
        found.append(estimate.phi)
        carry = estimate.carry
        if carry is None:
            return found


def public(rule, phi: dict, problem: Problem) -> list[dict]:
    """The widely copied loop: backward() on each step's loss with the graph retained, inputs detached (and cloned)."""
    w, y = problem.data(0)
    theta, cells, found = problem.theta["theta"].clone(), None, []
    for _ in range(STEPS // WINDOW):
        leaves = {k: v.clone().requires_grad_() for k, v in phi.items()}
        theta, total = theta.detach().requires_grad_(), 0.0
        cells = None if cells is None else [c.detach() for c in cells]
        loss = squares(w, y, theta)
        for _ in range(WINDOW):
            theta.retain_grad()
            loss.backward(retain_graph=True)
            grad = theta.grad.detach().clone()
            state = {"step": 0, "lr": 1.0, "loss": torch.zeros(len(theta)), "cells": cells}
            updates, state = rule.update(leaves, {"theta": grad}, state)
            cells, theta = state["cells"], theta + updates["theta"]
            loss = squares(w, y, theta)
            total = total + loss / (WINDOW * len(theta))
        found.append(dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())))))
    return found


def squares(w: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """The sum over tasks of the sum of squares of W theta - y."""
    return ((w @ theta.unsqueeze(-1)).squeeze(-1) - y).square().sum()


def agree(found: list[dict], expected: list[dict], what: str) -> None:
    """Stop unless the first window's gradients are the same."""
    for name, value in expected[0].items():
        gap = (found[0][name] - value).abs().max() / value.abs().max()
        assert gap < 1e-4, f"{what} differs from the loop by {gap:.1e} in {name}"


def one_by_one(rule, phi: dict, problem: Problem, pairs: int, sigma: float, horizon: int) -> dict:
    """Evolution strategies by a loop over the perturbed copies."""
    copies, noise = antithetic(phi, pairs, sigma, torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [
            run(rule, {k: v[i] for k, v in copies.items()}, problem, None, horizon)[0].mean() for i in range(2 * pairs)
        ]
    weight = (torch.stack(losses[:pairs]) - torch.stack(losses[pairs:])) / (2 * sigma**2 * pairs)
    return {k: torch.tensordot(weight.to(v.dtype), v, 1) for k, v in noise.items()}


def learned(rounds: int, threads: int, contest: Callable, ratio: Callable, report: Callable) -> None:
    """The comparisons of learned optimizers."""
    rule = lstm(generator=torch.Generator().manual_seed(0))
    phi = {k: v.float() for k, v in rule.phi.items()}
    problem = LeastSquares(10).sample(TASKS, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    estimator = truncated(WINDOW, STEPS, stop_gradient=True)
    agree(windows(rule, phi, problem, estimator), public(rule, phi, problem), "the library's truncated gradient")
    runs = {"public": lambda: public(rule, phi, problem), "library": lambda: windows(rule, phi, problem, estimator)}
    times = contest(runs, max(3, rounds // 3))
    label = f"{threads} thread(s)  LSTM optimizer, backward() at each step / library"
    report(label, ratio(times, "public", "library"), 5)
    populations(rounds, threads, contest, ratio, report)
    jax(rule, phi, problem, times["library"], threads, report)


def populations(rounds: int, threads: int, contest: Callable, ratio: Callable, report: Callable) -> None:
    """ES and PES of the per-parameter network, 16 pairs on 4 problems, as one stacked batch and by a loop over the copies."""
    rule = per_parameter_mlp(generator=torch.Generator().manual_seed(0))
    problem = LeastSquares(10).sample(4, generator=torch.Generator().manual_seed(1))
    settings, whole = (rule, rule.phi, problem), es(WINDOW, 16, 0.01)
    agree(windows(*settings, whole), [one_by_one(*settings, 16, 0.01, WINDOW)], "stacked ES")
    runs = {"loop": lambda: one_by_one(*settings, 16, 0.01, WINDOW)}
    runs |= {"ES": lambda: windows(*settings, whole)}
    runs |= {"PES": lambda: windows(*settings, pes(WINDOW, WINDOW, 16, 0.01))}
    times = contest(runs, max(3, rounds // 3))
    for name in ("ES", "PES"):
        report(f"{threads} thread(s)  {name}, a loop over 32 copies / stacked", ratio(times, "loop", name), 5)


def jax(rule, phi: dict, problem: Problem, ours: list[float], threads: int, report: Callable) -> None:
    """The same meta-iteration as a jax.lax.scan in a process of its own, after comparing its gradients."""
    w, y = problem.data(0)
    tensors = {"w": w, "y": y, "theta": problem.theta["theta"], "phi": phi}
    command = [sys.executable, __file__.replace("bench_rules", "bench_jax"), str(threads), str(STEPS), str(WINDOW)]
    content = json.dumps({k: v.tolist() if isinstance(v, Tensor) else {n: t.tolist() for n, t in v.items()} for k, v in tensors.items()})
    done = subprocess.run(command, input=content, capture_output=True, text=True)
    if done.returncode == 3:
        print(f"{threads} thread(s)  LSTM optimizer, library / JAX scan: skipped, JAX is missing (pip install jax)")
        return
    answer = json.loads(done.stdout)
    expected = windows(rule, phi, problem, truncated(WINDOW, STEPS, stop_gradient=True))
    agree([{k: torch.tensor(v) for k, v in answer["gradient"].items()}], expected, "JAX's gradient")
    ratios = sorted(a / b for a, b in zip(sorted(ours), sorted(answer["seconds"])))
    label = f"{threads} thread(s)  LSTM optimizer, library / JAX scan"
    report(label, (ratios[len(ratios) // 2], ratios[0], ratios[-1]), 1.3, False)
