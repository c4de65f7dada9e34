"""Many perturbed copies of a rule on the same problems, evaluated as one stacked batch."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from .rules import Params, Phi, State, UpdateRule
from .tasks.problems import Problem


def population(rule: UpdateRule, copies: int) -> UpdateRule:
    """`rule` for `copies` values of phi at once: phi [copies, ...], parameters and state [copies * tasks, ...]."""

    def update(phi: Phi, grads: Params, state: State) -> tuple[Params, State]:
        leaves, spec = pytree.tree_flatten((grads, state))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        layout: list = []

        def one(phi: Phi, *tensors: Tensor) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for i, t in zip(where, tensors):
                filled[i] = t
            out, out_spec = pytree.tree_flatten(rule.update(phi, *pytree.tree_unflatten(filled, spec)))
            layout[:] = [out, out_spec]
            return tuple(o for o in out if isinstance(o, Tensor))

        tensors = [leaves[i].reshape(copies, -1, *leaves[i].shape[1:]) for i in where]
        found = iter(vmap(one)(phi, *tensors))
        out = [next(found).flatten(0, 1) if isinstance(o, Tensor) else o for o in layout[0]]
        return pytree.tree_unflatten(out, layout.pop())

    return UpdateRule(rule.phi, rule.init, update)


def repeat(problem: Problem, copies: int) -> Problem:
    """The same problems `copies` times, one copy after the other: tensors [tasks, ...] become [copies * tasks, ...].

    Data that stay the same tensors from step to step are copied once.
    """

    def copied(tree):
        return pytree.tree_map(lambda v: v.repeat(copies, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) else v, tree)

    last: list = [[None], None]

    def data(t: int):
        found = problem.data(t)
        leaves = pytree.tree_leaves(found)
        if [*map(id, leaves)] != [*map(id, last[0])]:
            last[:] = [leaves, copied(found)]
        return last[1]

    theta, facts = copied(problem.theta), copied(problem.facts)
    return replace(problem, theta=theta, facts=facts, data=data)


def antithetic(phi: Phi, pairs: int, sigma: float, generator: torch.Generator) -> tuple[Phi, Phi]:
    """Normal perturbations e of standard deviation sigma: (phi + e and phi - e [2 * pairs, ...], e [pairs, ...])."""
    def draw(v: Tensor) -> Tensor:
        return sigma * torch.randn(pairs, *v.shape, generator=generator, dtype=torch.float64).to(v)

    noise = pytree.tree_map(draw, phi)
    return pytree.tree_map(lambda v, e: torch.cat([v + e, v - e]), phi, noise), noise
