"""Training problems for an optimizer to solve, stacked on a leading task axis: quadratics and logistic regression."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rules import Params
from .quadratics import random_quadratics


@dataclass(frozen=True)
class Problem:
    """Several training problems of one kind, side by side.

    Attributes:
        theta: initial parameters, each [tasks, ...].
        loss: (params, data) -> losses [tasks].
        data: step t >= 0 -> the data of that step, a tree of tensors [tasks, ...].
        facts: what is known of each task, [tasks] each: "L" and "m", the largest and smallest curvature; "optimum", the
            smallest loss.
        gradient: (params, data) -> losses and their gradients, where they are written out.
        scores: name -> params -> [tasks], for judging: "test accuracy", "validation loss", ... Evolution strategies call
            them with several copies of the tasks, one copy after the other: params [copies * tasks, ...].
    """

    theta: Params
    loss: Callable[[Params, Any], Tensor]
    data: Callable[[int], Any]
    facts: dict[str, Tensor] = field(default_factory=dict)
    gradient: Callable[[Params, Any], tuple[Tensor, Params]] | None = None
    scores: dict[str, Callable[[Params], Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.theta.values())))

    def losses(self, params: Params, data: Any) -> Tensor:
        """`loss`, checked: a ValueError unless it is one number per task."""
        found = self.loss(params, data)
        if found.shape != (len(self),):
            raise ValueError(f"problem.loss must return one number per task, [{len(self)}], got {tuple(found.shape)}")
        return found

    def score(self, name: str, params: Params) -> Tensor:
        """The score of that name, [tasks]; a ValueError if there is none."""
        if name not in self.scores:
            raise ValueError(f"score names {name!r}, but the problem's scores are {sorted(self.scores)}")
        return self.scores[name](params)

    def excess(self, losses: Tensor) -> Tensor:
        """Losses [..., tasks] above the optimum, where it is known."""
        return losses - self.facts["optimum"] if "optimum" in self.facts else losses


class Quadratics:
    """f = ½ (theta - c)ᵀ A (theta - c) from theta_0 = 0: eigenvalues between L / kappa and L, both attained.

    Args:
        dim: number of parameters.
        kappa: condition number L / m.
        largest: L is log-uniform between these two bounds, anew for each task.
    """

    def __init__(self, dim: int = 20, kappa: float = 100.0, largest: tuple[float, float] = (0.3, 3.0)) -> None:
        self.dim, self.kappa, self.largest = dim, kappa, _bounds(largest)

    def sample(self, tasks: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Problem:
        """`tasks` quadratics; A [tasks, dim, dim] and c [tasks, dim] are the data of every step."""
        drawn = random_quadratics(tasks, self.dim, kappa=self.kappa, generator=generator)
        low, high = self.largest
        scale = low * (high / low) ** torch.rand(tasks, generator=generator, dtype=torch.float64)
        matrix, centre = (drawn.A * scale[:, None, None]).to(dtype), drawn.c.to(dtype)
        facts = {"L": scale.to(dtype), "m": (scale / self.kappa).to(dtype), "optimum": torch.zeros(tasks, dtype=dtype)}
        theta = {"theta": torch.zeros_like(centre)}
        return Problem(theta, quadratic_loss, lambda t: (matrix, centre), facts, quadratic_gradient)


def quadratic_loss(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
    """½ (theta - c)ᵀ A (theta - c), [tasks]."""
    return quadratic_gradient(params, data)[0]


def quadratic_gradient(params: Params, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Params]:
    """The loss and its gradient A (theta - c)."""
    matrix, centre = data
    gap = params["theta"] - centre
    slope = (matrix @ gap.unsqueeze(-1)).squeeze(-1)
    return 0.5 * (gap * slope).sum(-1), {"theta": slope}


class LeastSquares:
    """f = (W theta - y)² summed, with W and y normal, theta_0 normal: the quadratics of Andrychowicz et al. (2016), section 3.1."""

    def __init__(self, dim: int = 10) -> None:
        self.dim = dim

    def sample(self, tasks: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Problem:
        """`tasks` problems; W [tasks, dim, dim] and y [tasks, dim] are the data of every step."""
        w = torch.randn(tasks, self.dim, self.dim, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randn(tasks, self.dim, generator=generator, dtype=torch.float64).to(dtype)
        theta = torch.randn(tasks, self.dim, generator=generator, dtype=torch.float64).to(dtype)
        return Problem({"theta": theta}, squares_loss, lambda t: (w, y), {"optimum": w.new_zeros(tasks)}, squares_gradient)


def squares_loss(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of squares of W theta - y, [tasks]."""
    return squares_gradient(params, data)[0]


def squares_gradient(params: Params, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Params]:
    """The loss and its gradient 2 Wᵀ (W theta - y)."""
    w, y = data
    gap = (w @ params["theta"].unsqueeze(-1)).squeeze(-1) - y
    return (gap * gap).sum(-1), {"theta": 2 * (w.mT @ gap.unsqueeze(-1)).squeeze(-1)}


class LogisticRegression:
    """Two classes, mean logistic loss plus 1e-3 theta² / 2; inputs with a log-uniform spread of scales.

    Args:
        examples: number of examples n of each task.
        dim: number of weights.
        spread: ratio of the largest to the smallest standard deviation of the inputs' directions.
        largest: bounds of the largest standard deviation squared, log-uniform.
    """

    ridge = 1e-3

    def __init__(
        self, examples: int = 100, dim: int = 10, spread: float = 10.0, largest: tuple[float, float] = (1.2, 12.0)
    ) -> None:
        if not spread >= 1:
            raise ValueError(f"spread must be >= 1, got {spread!r}")
        self.examples, self.dim, self.spread, self.largest = examples, dim, spread, _bounds(largest)

    def sample(self, tasks: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Problem:
        """`tasks` problems; x [tasks, n, dim] and signs y [tasks, n] are the data of every step."""
        drawn = random_quadratics(tasks, self.dim, kappa=self.spread**2, generator=generator)
        low, high = self.largest
        scale = low * (high / low) ** torch.rand(tasks, 1, 1, generator=generator, dtype=torch.float64)
        root = torch.linalg.cholesky(drawn.A * scale)
        x = torch.randn(tasks, self.examples, self.dim, generator=generator, dtype=torch.float64) @ root.mT
        logits = (x @ torch.linalg.solve_triangular(root, drawn.c.unsqueeze(-1), upper=False)).squeeze(-1)
        y = torch.where(torch.rand(logits.shape, generator=generator, dtype=torch.float64) < logits.sigmoid(), 1.0, -1.0)
        largest = torch.linalg.eigvalsh(x.mT @ x)[:, -1] / (4 * self.examples) + self.ridge
        optimum = logistic_loss({"theta": minimise_logistic(x, y)}, (x, y))
        facts = {"L": largest.to(dtype), "m": torch.full_like(largest, self.ridge).to(dtype), "optimum": optimum.to(dtype)}
        data = (x.to(dtype), y.to(dtype))
        theta = {"theta": torch.zeros(tasks, self.dim, dtype=dtype)}
        return Problem(theta, logistic_loss, lambda t: data, facts, logistic_gradient)


def logistic_loss(params: Params, data: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over examples of log(1 + exp(-y xᵀ theta)), plus the ridge, [tasks]."""
    return logistic_gradient(params, data)[0]


def logistic_gradient(params: Params, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Params]:
    """The loss and its gradient -mean y x sigmoid(-y xᵀ theta) + ridge theta."""
    (x, y), theta = data, params["theta"]
    margin = y * (x @ theta.unsqueeze(-1)).squeeze(-1)
    loss = F.softplus(-margin).mean(-1) + 0.5 * LogisticRegression.ridge * (theta * theta).sum(-1)
    pull = (y * torch.sigmoid(-margin)).unsqueeze(-2) @ x / x.shape[-2]
    return loss, {"theta": LogisticRegression.ridge * theta - pull.squeeze(-2)}


def minimise_logistic(x: Tensor, y: Tensor) -> Tensor:
    """The minimum of the logistic loss by 50 damped Newton steps, [tasks, dim]."""
    theta = x.new_zeros(len(x), x.shape[-1])
    ridge = LogisticRegression.ridge * torch.eye(x.shape[-1], dtype=x.dtype)
    for _ in range(50):
        loss, grads = logistic_gradient({"theta": theta}, (x, y))
        p = torch.sigmoid((x @ theta.unsqueeze(-1)).squeeze(-1))
        hessian = (x * (p * (1 - p)).unsqueeze(-1)).mT @ x / x.shape[1] + ridge
        step = torch.linalg.solve(hessian, grads["theta"])
        rate = torch.ones(len(x), 1, dtype=x.dtype)
        for _ in range(20):
            worse = logistic_loss({"theta": theta - rate * step}, (x, y)) > loss
            rate = torch.where(worse.unsqueeze(-1), rate / 2, rate)
        theta = theta - rate * step
    return theta


def _bounds(largest: tuple[float, float]) -> tuple[float, float]:
    if not 0 < largest[0] <= largest[1]:
        raise ValueError(f"largest must hold two bounds, 0 < low <= high, got {largest!r}")
    return largest
