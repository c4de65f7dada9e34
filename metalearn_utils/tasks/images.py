"""Few-shot classification from a fixed list of classes: random classes, random labels, disjoint drawings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Batch, Tasks


class ImageClasses:
    """Images by class, from which N-way tasks are drawn.

    Attributes:
        images: uint8 [classes, drawings, height, width], white on black.
        names: one name per class, e.g. "Hebrew/alef".
    """

    def __init__(self, images: Tensor, names: Sequence[str]) -> None:
        if images.dim() != 4 or images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 [classes, drawings, h, w], got {images.dtype} {list(images.shape)}")
        if len(names) != len(images):
            raise ValueError(f"names must hold one name for each of {len(images)} classes, got {len(names)}")
        self.images, self.names = images, list(names)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.images)

    def sample(
        self,
        tasks: int,
        *,
        ways: int,
        shots: int,
        queries: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> Tasks:
        """Draw tasks: x [tasks, ways * n, 1, h, w] in [0, 1] and labels y [tasks, ways * n] in 0 .. ways - 1.

        Classes and their labels are drawn anew for every task, so that a label means nothing across tasks; support
        and query show different drawings of the same classes, labelled once.

        Args:
            tasks, ways: how many tasks, and classes per task.
            shots, queries: support and query drawings per class.
            generator: a CPU generator, the only source of randomness.
        """
        self._check(tasks=tasks, ways=ways, shots=shots, queries=queries)
        classes = torch.rand(tasks, self.n_classes, generator=generator).argsort(1)[:, :ways]
        drawings = torch.rand(tasks, ways, self.images.shape[1], generator=generator).argsort(2)[..., : shots + queries]
        x = self.images[classes[..., None], drawings].to(dtype).div_(255).unsqueeze(3)
        y = torch.arange(ways)[:, None].expand(tasks, ways, shots + queries)
        return Tasks(_flat(x[:, :, :shots], y[..., :shots]), _flat(x[:, :, shots:], y[..., shots:]))

    def batch(self, examples: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Batch:
        """Random examples with their global class index, for supervised training: x [examples, 1, h, w], y."""
        y = torch.randint(self.n_classes, (examples,), generator=generator)
        drawing = torch.randint(self.images.shape[1], (examples,), generator=generator)
        return Batch(self.images[y, drawing].to(dtype).div_(255).unsqueeze(1), y)

    def _check(self, **counts: int) -> None:
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if counts["ways"] > self.n_classes:
            raise ValueError(f"ways must be at most the {self.n_classes} classes there are, got {counts['ways']}")
        needed = counts["shots"] + counts["queries"]
        if needed > self.images.shape[1]:
            raise ValueError(f"shots + queries must be at most {self.images.shape[1]} drawings per class, got {needed}")


def _flat(x: Tensor, y: Tensor) -> Batch:
    return Batch(x.flatten(1, 2), y.flatten(1, 2).contiguous())
