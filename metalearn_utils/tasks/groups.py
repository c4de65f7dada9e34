"""Alphabets within a list of classes: which there are, tasks inside one of them, and rotated characters as new classes.

Drawing all classes of a task from one alphabet is the harder protocol of Lake et al. (2015); mixing alphabets and
adding rotations are habits of later papers. Results differ, so the choice is made by name and never by default.
"""

import torch

from .base import Batch, Tasks
from .images import ImageClasses


def alphabets(images: ImageClasses) -> dict[str, int]:
    """Number of classes in each alphabet or script, sorted by name: the part of a class name before the slash."""
    found: dict[str, int] = {}
    for name in images.names:
        found[name.split("/")[0]] = found.get(name.split("/")[0], 0) + 1
    return dict(sorted(found.items()))


def rotated(images: ImageClasses) -> ImageClasses:
    """Each class four times, turned by 0, 90, 180 and 270 degrees; the names end in "@0" to "@270".

    For training only: with rotations among the test classes, results cannot be compared with published ones.
    """
    turned = [torch.rot90(images.images, k, (2, 3)) for k in range(4)]
    return ImageClasses(torch.cat(turned), [f"{name}@{90 * k}" for k in range(4) for name in images.names])


class WithinAlphabets:
    """Tasks whose classes all come from one alphabet, drawn anew for every task.

    Attributes:
        parts: the classes of each alphabet.
    """

    def __init__(self, images: ImageClasses) -> None:
        of = [name.split("/")[0] for name in images.names]
        rows = {a: [i for i, found in enumerate(of) if found == a] for a in alphabets(images)}
        self.parts = {a: ImageClasses(images.images[r], [images.names[i] for i in r]) for a, r in rows.items()}

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
        """Draw tasks as `ImageClasses.sample` does; alphabets with fewer than `ways` classes are passed over.

        Raises:
            ValueError: tasks < 1, no alphabet has enough classes, or a count that `ImageClasses.sample` refuses.
        """
        if not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"tasks must be an integer >= 1, got {tasks!r}")
        wide = [part for part in self.parts.values() if part.n_classes >= ways]
        if not wide:
            largest = max(part.n_classes for part in self.parts.values())
            raise ValueError(f"ways must be at most the {largest} classes of the largest alphabet, got {ways}")
        chosen = torch.randint(len(wide), (tasks,), generator=generator).tolist()
        options = {"ways": ways, "shots": shots, "queries": queries, "generator": generator, "dtype": dtype}
        drawn = [wide[i].sample(1, **options) for i in chosen]
        return Tasks(_stack([d.support for d in drawn]), _stack([d.query for d in drawn]))


def _stack(batches: list[Batch]) -> Batch:
    return Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))
