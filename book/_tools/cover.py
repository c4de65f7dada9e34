"""Draw the cover: adaptation paths from a meta-learned start over the tasks' loss contours. Writes _static/cover.html."""

from pathlib import Path

import torch
from torch import nn

from metalearn_utils import Batch, Learner, Tasks, adapt, maml, sgd
from metalearn_utils.plots import INK, bundle, figure

ANGLES, CENTRES = (0.5, 2.6, 4.5), ((1.9, 1.1), (-2.0, 0.9), (0.2, -1.7))
COLOURS = ("#2b7bba", "#cf6a17", "#2e8b57")
LR, STEPS = 0.15, 5


class Point(nn.Module):
    """A model that is its parameters: f_theta(x) = theta for every x."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.theta.expand(len(x), 2)


def quadratic(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1/2 (theta - c)' A (theta - c), with y = (c, A) in six numbers."""
    away = outputs - y[:, :2]
    return 0.5 * torch.einsum("ni,nij,nj->n", away, y[:, 2:].reshape(-1, 2, 2), away).mean()


def tasks() -> Tasks:
    """Three long valleys of different direction."""
    rows = []
    for angle, centre in zip(ANGLES, CENTRES):
        a = torch.tensor(angle)
        turn = torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])])
        matrix = turn @ torch.diag(torch.tensor([1.0, 6.0])) @ turn.T
        rows.append(torch.cat([torch.tensor(centre), matrix.flatten()]))
    y = torch.stack(rows)[:, None].double()
    return Tasks(Batch(torch.zeros(3, 1, 1).double(), y), Batch(torch.zeros(3, 1, 1).double(), y))


def main() -> None:
    """Meta-learn the start by gradient descent on the exact meta-gradient, then draw."""
    learner, data = Learner(Point(), quadratic, sgd(LR), STEPS), tasks()
    theta = {"theta": torch.tensor([1.0, 1.5], dtype=torch.float64)}
    for _ in range(500):
        theta = {"theta": theta["theta"] - 0.5 * maml(learner, theta, data).theta["theta"]}
    fig, ax = figure(height=3.6, width=6.4)
    x, y = torch.meshgrid(torch.linspace(-4.2, 4.2, 200), torch.linspace(-3.9, 2.6, 200), indexing="xy")
    for row, colour in zip(data.support.y[:, 0], COLOURS):
        at = torch.stack([x, y], -1).reshape(-1, 2).double()
        away = at - row[:2]
        loss = 0.5 * torch.einsum("ni,ij,nj->n", away, row[2:].reshape(2, 2), away).reshape(200, 200)
        ax.contour(x, y, loss, levels=[0.1, 0.5, 1.3], colors=colour, alpha=0.45, linewidths=1)

        def task_loss(p, _, row=row):
            return quadratic(p["theta"][None], row[None])

        path = adapt(task_loss, theta, None, sgd(LR), STEPS).path
        points = torch.stack([p["theta"] for p in path]).detach()
        ax.plot(*points.T, "o-", color=colour, ms=4)
    ax.plot(*theta["theta"], "o", color=INK, ms=9)
    ax.annotate("θ₀", theta["theta"].tolist(), xytext=(8, 8), textcoords="offset points", fontsize=13, color=INK)
    ax.set_axis_off()
    ax.set_aspect("equal")
    alt = "Contours of three tasks' losses, and from one common starting point a short path of five steps into each."
    html = bundle(fig, "From a learned start, five gradient steps go a long way into every task", alt)["text/html"]
    Path("book/_static/cover.html").write_text(html + "\n", "utf-8")


if __name__ == "__main__":
    main()
