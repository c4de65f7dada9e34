"""Alphabets as groups of classes: tasks that stay inside one, and rotations that are recorded."""

import pytest
import torch

from metalearn_utils.tasks.groups import WithinAlphabets, alphabets, rotated
from metalearn_utils.tasks.images import ImageClasses


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def three_alphabets() -> ImageClasses:
    """Alphabets of 6, 5 and 2 classes, interleaved; every image carries its class and drawing number."""
    names = [f"{a}/{i}" for i in range(6) for a, n in (("b", 6), ("a", 5), ("c", 2)) if i < n]
    images = torch.zeros(13, 4, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1] = torch.arange(13)[:, None], torch.arange(4)
    return ImageClasses(images, names)


def classes_of(x: torch.Tensor) -> torch.Tensor:
    return (255 * x[..., 0, 0, 0]).round().long()


def test_alphabets_are_counted_by_name():
    assert alphabets(three_alphabets()) == {"a": 5, "b": 6, "c": 2}


def test_every_task_stays_within_one_alphabet_and_every_wide_one_is_used():
    images = three_alphabets()
    tasks = WithinAlphabets(images).sample(200, ways=5, shots=1, queries=2, generator=generator())
    found = [{images.names[c].split("/")[0] for c in row.tolist()} for row in classes_of(tasks.support.x)]
    assert all(len(f) == 1 for f in found)
    assert set.union(*found) == {"a", "b"}
    support, query = ([set(row.tolist()) for row in classes_of(batch.x)] for batch in tasks)
    assert support == query


def test_tasks_within_an_alphabet_have_the_shapes_of_other_tasks():
    options = {"ways": 2, "shots": 1, "queries": 3, "generator": generator(), "dtype": torch.float64}
    inside, mixed = WithinAlphabets(three_alphabets()).sample(7, **options), three_alphabets().sample(7, **options)
    for a, b in zip((*inside.support, *inside.query), (*mixed.support, *mixed.query)):
        assert a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 1, "ways": 7}, "ways must be at most the 6 classes of the largest alphabet, got 7"),
        ({"tasks": 0, "ways": 2}, "tasks must be an integer >= 1, got 0"),
    ],
)
def test_impossible_tasks_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        WithinAlphabets(three_alphabets()).sample(**options, shots=1, queries=1, generator=generator())


def test_rotations_are_new_classes_whose_names_record_the_angle():
    images = three_alphabets()
    turned = rotated(images)
    assert turned.n_classes == 52 and turned.names[13] == "b/0@90"
    assert alphabets(turned) == {"a": 20, "b": 24, "c": 8}
    assert torch.equal(turned.images[13:26], images.images.rot90(1, (2, 3)))
    assert torch.equal(turned.images[26:39], images.images.flip((2, 3)))
