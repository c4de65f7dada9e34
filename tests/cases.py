"""Small tasks, models and reference computations that the tests share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalearn_utils.convnets import conv4
from metalearn_utils.meta import Learner, MetaGradient
from metalearn_utils.models import mlp, params_of
from metalearn_utils.parallel import cross_entropy, mse
from metalearn_utils.rules import Params, UpdateRule, sgd
from metalearn_utils.tasks.base import Batch, Tasks
from metalearn_utils.tasks.quadratics import Point, Quadratics, quadratic, scalar_quadratics

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    """A generator with this seed."""
    return torch.Generator().manual_seed(seed)


def quadratics(tasks: int, dim: int, seed: int = 0) -> Quadratics:
    """Random positive definite quadratics, eigenvalues between 0.3 and about 3."""
    g = seeded(seed)

    def matrices() -> Tensor:
        root = torch.randn(tasks, dim, dim, generator=g, dtype=F64) / dim**0.5
        return root @ root.mT + 0.3 * torch.eye(dim, dtype=F64)

    def points() -> Tensor:
        return torch.randn(tasks, dim, generator=g, dtype=F64)

    return Quadratics(matrices(), points(), matrices(), points())


def point_learner(dim: int, rule: UpdateRule, steps: int, **settings) -> Learner:
    """The learner of quadratic tasks."""
    return Learner(Point(dim), quadratic, rule, steps, **settings)


# Regression and image tasks.


def regression(tasks: int, shots: int, queries: int, inputs: int = 1, outputs: int = 1, seed: int = 0) -> Tasks:
    """Random smooth regression tasks in float64: x [tasks, n, inputs], y [tasks, n, outputs]."""
    g = seeded(seed)
    slope = torch.randn(tasks, inputs, outputs, generator=g, dtype=F64)

    def batch(n: int) -> Batch:
        x = torch.randn(tasks, n, inputs, generator=g, dtype=F64)
        return Batch(x, torch.sin(x @ slope) + 0.3)

    return Tasks(batch(shots), batch(queries))


def images(tasks: int, ways: int, shots: int, queries: int, side: int = 28, seed: int = 0) -> Tasks:
    """Random images in float64 with every class in every task, labels in a random order."""
    g = seeded(seed)
    means = torch.rand(tasks, ways, 1, side, side, generator=g, dtype=F64)

    def batch(n: int) -> Batch:
        order = torch.stack([torch.randperm(ways * n, generator=g) for _ in range(tasks)])
        y = order % ways
        x = torch.stack([m[label] for m, label in zip(means, y)])
        return Batch(x + 0.3 * torch.randn(x.shape, generator=g, dtype=F64), y)

    return Tasks(batch(shots), batch(queries))


def tanh_net(seed: int = 0, sizes: tuple[int, ...] = (1, 5, 4, 1)) -> tuple[nn.Module, Params]:
    """A smooth network with weights and biases away from zero."""
    model = mlp(sizes, "tanh", seeded(seed))
    return model, jittered(params_of(model, F64), seed)


def small_conv(ways: int = 3, channels: int = 3, seed: int = 0, **kind) -> tuple[nn.Module, Params]:
    """conv4 with few channels, its normalisation weights away from one and zero."""
    model = conv4(ways, channels, generator=seeded(seed), **kind)
    return model, jittered(params_of(model, F64), seed)


def jittered(theta: Params, seed: int = 0) -> Params:
    """theta plus a little noise, so that no parameter sits at a special value."""
    g = seeded(seed + 100)
    return {k: v + 0.1 * torch.randn(v.shape, generator=g, dtype=F64) for k, v in theta.items()}


# Reference computations, written without the library.


def plain_gradient(
    learner: Learner, theta: Params, tasks: Tasks, alpha: float, first_order: bool = False
) -> tuple[float, Params]:
    """The meta-gradient of gradient descent's inner loop by a plain loop over tasks and one autograd graph."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in theta.items()}
    losses = []
    for xs, ys, xq, yq in zip(*tasks.support, *tasks.query):
        params = leaves
        for _ in range(learner.steps):
            support = learner.loss(functional_call(learner.model, params, (xs,)), ys)
            grads = torch.autograd.grad(support, list(params.values()), create_graph=True)
            cut = [g.detach() if first_order else g for g in grads]
            params = {k: p - alpha * g for (k, p), g in zip(params.items(), cut)}
        losses.append(learner.loss(functional_call(learner.model, params, (xq,)), yq))
    mean = sum(losses) / len(losses)
    return mean.item(), dict(zip(leaves, torch.autograd.grad(mean, list(leaves.values()))))


def finite_differences(f: Callable[[Params], float], at: Params, seed: int = 0, h: float = 1e-5) -> list[tuple]:
    """Central differences of f along two random directions in each tensor: [(direction, derivative)]."""
    g, found = seeded(seed), []
    for name, value in at.items():
        for _ in range(2):
            v = torch.randn(value.shape, generator=g, dtype=F64)
            slope = (f(at | {name: value + h * v}) - f(at | {name: value - h * v})) / (2 * h)
            found.append(({name: v}, slope))
    return found


def assert_slopes(f: Callable[[Params], float], at: Params, gradient: Params, tolerance: float = 1e-6) -> None:
    """The gradient agrees with central differences of f: relative error below `tolerance`."""
    pairs = finite_differences(f, at)
    numeric = torch.tensor([slope for _, slope in pairs], dtype=F64)
    exact = torch.stack([sum((gradient[k] * v).sum() for k, v in d.items()) for d, _ in pairs])
    assert exact.norm() > 1e-6, "the gradient vanishes: this check could not fail"
    error = ((numeric - exact).norm() / exact.norm()).item()
    assert error < tolerance, f"relative error {error:.2e} against finite differences"


def largest_difference(a: Params, b: Params) -> float:
    """The largest difference between two dicts of tensors, relative to the largest entry of the second."""
    assert a.keys() == b.keys(), f"{sorted(a)} against {sorted(b)}"
    assert all(a[k].shape == b[k].shape for k in a)
    scale = max(v.abs().max().item() for v in b.values())
    assert scale > 0, "all entries vanish: this check could not fail"
    return max((a[k] - b[k]).abs().max().item() for k in a) / scale


def assert_same(a: Params, b: Params, tolerance: float = 1e-9) -> None:
    """Two dicts of tensors agree, relative to the largest entry."""
    error = largest_difference(a, b)
    assert error < tolerance, f"relative difference {error:.2e}"


def regression_learner(rule: UpdateRule | None = None, steps: int = 2, **settings) -> tuple[Learner, Params]:
    """A tanh network with squared error."""
    model, theta = tanh_net()
    return Learner(model, mse, rule or sgd(0.1), steps, **settings), theta


def image_learner(rule: UpdateRule | None = None, steps: int = 2, ways: int = 3, **settings) -> tuple[Learner, Params]:
    """The smooth conv4 with cross-entropy."""
    model, theta = small_conv(ways, 2, pool="stride", smooth=True)
    return Learner(model, cross_entropy, rule or sgd(0.1), steps, **settings), theta


def gradients_of(found: MetaGradient) -> tuple[Params, Params]:
    """The two gradients of a result, phi flattened to one level of names."""
    flat = {}
    for name, value in (found.phi or {}).items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found.theta, flat
