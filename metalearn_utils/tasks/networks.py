"""Small networks to be trained by an optimizer: scikit-learn's digits, and glyphs with other classes in every task."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import MLP, mlp
from ..parallel import batched, cross_entropy
from ..rules import Params
from .base import Batch
from .glyphs import Glyphs
from .problems import Problem


class SigmoidMLP(MLP):
    """The fully connected network with sigmoid units, as in Andrychowicz et al. (2016), section 3.2."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes, "tanh", None)
        self.activation, self.derivative = torch.sigmoid, lambda h: h * (1 - h)


class Digits:
    """Train a small network on scikit-learn's 1,797 digits, 8 x 8 pixels; tasks differ in initial weights and batches.

    Args:
        hidden: units of each hidden layer.
        activation: "sigmoid", "tanh" or "relu".
        batch: images per step.
        scale: factor on the pixels, which lie in [0, 1].
    """

    def __init__(
        self, hidden: Sequence[int] = (20,), activation: str = "sigmoid", batch: int = 64, scale: float = 1.0
    ) -> None:
        images, labels = load_digits()
        self.model = network((64, *hidden, 10), activation)
        self.batch, self.x, self.y, self.held_out = batch, scale * images, labels, 360

    def sample(self, tasks: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Problem:
        """`tasks` trainings; the last 360 images are kept for testing."""
        x, y = self.x.to(dtype).expand(tasks, -1, -1), self.y.expand(tasks, -1)
        n = len(self.y) - self.held_out
        train, test = Batch(x[:, :n], y[:, :n]), Batch(x[:, n:], y[:, n:])
        return classification(self.model, train, test, self.batch, generator)


class GlyphClasses:
    """Train a small network on ten characters, other ones in every task: glyphs of 14 x 14 pixels.

    Args:
        split: "train", "val" or "test": which scripts the characters come from.
        ways: characters per task.
        hidden, activation, batch, scale: as for `Digits`.
    """

    def __init__(
        self,
        split: str,
        ways: int = 10,
        hidden: Sequence[int] = (20,),
        activation: str = "sigmoid",
        batch: int = 64,
        scale: float = 1.0,
    ) -> None:
        self.glyphs, self.ways, self.batch, self.scale = Glyphs(split), ways, batch, scale
        self.model = network((196, *hidden, ways), activation)

    def sample(self, tasks: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Problem:
        """`tasks` trainings on 15 drawings of each character; 5 further drawings are kept for testing."""
        drawn = self.glyphs.sample(tasks, ways=self.ways, shots=15, queries=5, generator=generator, dtype=dtype)
        train, test = (Batch(self.scale * _small(b.x), b.y) for b in drawn)
        return classification(self.model, train, test, self.batch, generator)


def network(sizes: Sequence[int], activation: str) -> MLP:
    """`mlp`, or the same with sigmoid units."""
    return SigmoidMLP(sizes) if activation == "sigmoid" else mlp(sizes, activation)


def classification(model: MLP, train: Batch, test: Batch, batch: int, generator: torch.Generator) -> Problem:
    """The mean cross-entropy of `batch` random training images per step; x [tasks, n, pixels], labels [tasks, n].

    The images of step t depend on t and one drawn number alone, so that a run can be repeated from any step.
    """
    seed = int(torch.randint(2**31, (), generator=generator))

    def data(t: int) -> Batch:
        at = torch.Generator().manual_seed(seed + t)
        rows = torch.randint(train.y.shape[1], (len(train.y), batch), generator=at)
        return Batch(train.x.gather(1, rows.unsqueeze(-1).expand(-1, -1, train.x.shape[-1])), train.y.gather(1, rows))

    forward = batched(model, cross_entropy)

    def loss(params: Params, b: Batch) -> Tensor:
        return forward.losses(forward.outputs(params, b.x, None), b.y)

    theta = initial(model, len(train.y), generator, train.x.dtype)
    return Problem(theta, loss, data, {}, forward.gradient, scores_of(model, train, test))


def initial(model: MLP, tasks: int, generator: torch.Generator, dtype: torch.dtype) -> Params:
    """Initial weights for every task: normal with variance gain^2 / inputs, biases zero; each [tasks, ...]."""
    gain = 2**0.5 if model.activation is F.relu else 1.0
    theta = {}
    for name, p in model.named_parameters():
        scale = gain * p.shape[-1] ** -0.5 if name.endswith("weight") else 0.0
        theta[name] = (scale * torch.randn(tasks, *p.shape, generator=generator, dtype=torch.float64)).to(dtype)
    return theta


def scores_of(model: MLP, train: Batch, test: Batch) -> dict[str, Callable[[Params], Tensor]]:
    """What a trained network is judged by, [tasks] each: losses over all images, and accuracy in percent."""

    def score(params: Params, b: Batch, accuracy: bool) -> Tensor:
        n = len(next(iter(params.values()))) // len(b.y)  # several copies of the same tasks
        x, y = b.x.repeat(n, 1, 1), b.y.repeat(n, 1)
        outputs = model.stacked(params, x)
        if accuracy:
            return 100 * (outputs.argmax(-1) == y).double().mean(1)
        return F.cross_entropy(outputs.transpose(1, 2), y, reduction="none").mean(1)

    return {
        "training loss": lambda params: score(params, train, False),
        "test loss": lambda params: score(params, test, False),
        "test accuracy": lambda params: score(params, test, True),
    }


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] in [0, 1] and labels [1797], in an order mixed once and for all."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    found = load()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(found.data)[order] / 16, torch.from_numpy(found.target).long()[order]


def _small(x: Tensor) -> Tensor:
    """[tasks, n, 1, 28, 28] -> [tasks, n, 196], means of 2 x 2 pixels."""
    return F.avg_pool2d(x.flatten(0, 1), 2).reshape(*x.shape[:2], -1)
