"""Draw the cover: `python book/_tools/cover.py` writes _static/cover.html and _static/equation.html.

The first shows adaptation paths from a meta-learned start over the tasks' loss contours, the second the book's one
equation, whose parts link to the pages about them.
"""

import html
from pathlib import Path

import torch
from torch import Tensor

from metalearn_utils import Learner, adapt, maml, sgd
from metalearn_utils.plots import INK, bundle, colour, figure
from metalearn_utils.tasks.quadratics import Point, Quadratics, quadratic

STATIC = Path(__file__).resolve().parents[1] / "_static"
ANGLES, CENTRES = (0.5, 2.6, 4.5), ((1.9, 1.1), (-2.0, 0.9), (0.2, -1.7))
COLOURS = tuple(map(colour, ("MAML", "prototypes", "Reptile")))
LR, STEPS, SIZE = 0.15, 5, "17"
# A symbol of the equation: its x, what it is, the page about it, and where the label stands.
PARTS = (
    (14, "θ", "t+1", "", None),
    (74, "=", "", "", None),
    (110, "θ", "t", "the start, θ₀|learned by MAML", "05-practice/maml-from-scratch.html"),
    (146, "+", "", "", None),
    (178, "u", "ϕ", "the rule: fixed,|or learned", "01-background/the-idea.html"),
    (215, "(", "", "", None),
    (230, "g", "t", "the gradient, and|its own gradient", "02-concepts/gradients-of-gradients.html"),
    (262, ",", "", "", None),
    (282, "s", "t", "the state: momentum,|Adam's averages", "01-background/one-setting.html"),
    (314, ")", "", "", None),
)
LABELS = {"θ": (120, 136), "u": (168, 30), "g": (240, 136), "s": (292, 30)}


def valleys() -> Quadratics:
    """Three long valleys of different direction."""
    angle = torch.tensor(ANGLES, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
    matrix = turn @ torch.diag(torch.tensor([1.0, 6.0], dtype=torch.float64)) @ turn.mT
    centre = torch.tensor(CENTRES, dtype=torch.float64)
    return Quadratics(matrix, centre, matrix, centre)


def start(tasks: Quadratics) -> Tensor:
    """The initialisation that gradient descent on the exact meta-gradient ends in."""
    learner, theta = Learner(Point(2), quadratic, sgd(LR), STEPS), torch.tensor([1.0, 1.5], dtype=torch.float64)
    for _ in range(500):
        theta = theta - 0.5 * maml(learner, {"theta": theta}, tasks.tasks()).theta["theta"]
    return theta


def loss(at: Tensor, matrix: Tensor, centre: Tensor) -> Tensor:
    """The loss of one task at points [..., 2]."""
    return 0.5 * torch.einsum("...i,ij,...j->...", at - centre, matrix, at - centre)


def cover() -> str:
    """The bundle of paths, as HTML."""
    tasks = valleys()
    theta, (fig, ax) = start(tasks), figure(height=3.15, width=5.4)
    axes = torch.linspace(-4.2, 4.2, 200, dtype=torch.float64), torch.linspace(-3.9, 2.6, 200, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)
    for matrix, centre, shade in zip(tasks.A, tasks.c, COLOURS):
        ax.contour(*grid.unbind(-1), loss(grid, matrix, centre), levels=[0.1, 0.5, 1.3], colors=shade, alpha=0.75, linewidths=1)
        path = adapt(lambda p, _: loss(p["theta"], matrix, centre), {"theta": theta}, None, sgd(LR), STEPS).path
        ax.plot(*torch.stack([p["theta"] for p in path]).detach().T, "o-", color=shade, ms=4)
    ax.plot(*theta, "o", color=INK, ms=9)
    ax.annotate("θ₀", theta.tolist(), xytext=(8, 8), textcoords="offset points", fontsize=13, color=INK)
    ax.set(xlim=(-3.9, 3.9), ylim=(-3.35, 2.25), aspect="equal")  # no wider than the contours
    ax.set_axis_off()
    alt = "Contours of three tasks' losses, and from one common starting point a short path of five steps into each."
    drawn = bundle(fig, "From a learned start, five gradient steps go a long way into every task", alt)["text/html"]
    return drawn.replace("max-width:34rem", "max-width:40rem")


def equation() -> str:
    """The equation as a picture with links."""
    alt = "The inner loop: theta at step t plus 1 is theta at step t plus the update u phi of the gradient and the state."
    drawn = "".join(part(*p) for p in PARTS)
    box = 'viewBox="12 14 356 150" style="width:100%;max-width:40rem;height:auto" fill="currentColor"'
    title = "One equation; each part leads to the page about it"
    return (
        f'<figure class="fig"><figcaption>{title}</figcaption>'
        f'<svg role="group" aria-label="{alt}" {box} font-family="system-ui,sans-serif">{drawn}</svg></figure>'
    )


def part(x: int, symbol: str, index: str, label: str, page: str | None) -> str:
    """One symbol, and, if it has a page, its label and a line to it, all one link."""
    serif = f'font-family="Georgia,serif" font-size="30"{" font-style=&quot;italic&quot;" if symbol.isalpha() else ""}'
    serif = serif.replace("&quot;", '"')
    below = f'<tspan dy="7" font-size="{SIZE}">{index}</tspan>' if index else ""
    text = f'<text x="{x}" y="92" {serif}>{symbol}{below}</text>'
    if not page:
        return text
    at, top = LABELS[symbol]
    lines = [f'<tspan x="{at}" dy="{15 * (i > 0)}">{html.escape(t)}</tspan>' for i, t in enumerate(label.split("|"))]
    words = f'<text x="{at}" y="{top}" text-anchor="middle" font-size="12.5">{"".join(lines)}</text>'
    ends = (102, top - 14) if top > 92 else (70, top + 20)
    rule = f'<path d="M{x + 10} {ends[0]} L{at} {ends[1]}" stroke="currentColor" stroke-width="0.8" opacity="0.5"/>'
    return f'<a href="{page}" class="part">{text}{rule}{words}</a>'


if __name__ == "__main__":
    (STATIC / "cover.html").write_text(cover() + "\n", "utf-8")
    (STATIC / "equation.html").write_text(equation() + "\n", "utf-8")
