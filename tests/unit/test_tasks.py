"""Task families: no leaks, exact constants, exact oracle, and errors that name the fault."""

import collections
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from metalearn_utils import NearestNeighbour, evaluate
from metalearn_utils.tasks import omniglot
from metalearn_utils.tasks.glyphs import DATA, SPLITS, Glyphs, draw, load_strokes, squared_distance
from metalearn_utils.tasks.images import ImageClasses
from metalearn_utils.tasks.omniglot import DataError, Omniglot
from metalearn_utils.tasks.sinusoids import Sinusoids, least_squares

FOLDER = omniglot.find_folder()
REAL = ("Japanese_(katakana)", "Sanskrit", "Tagalog")
needs_omniglot = pytest.mark.skipif(FOLDER is None, reason="METALEARN_DATA is not set: no real handwriting here")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(classes: int = 12, drawings: int = 6) -> ImageClasses:
    """Images that carry their class and drawing number as pixel values."""
    images = torch.zeros(classes, drawings, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1] = torch.arange(classes)[:, None], torch.arange(drawings)
    return ImageClasses(images, [f"c{i}" for i in range(classes)])


def test_sinusoid_constants_are_4_2517_and_3_0057():
    """E[y^2] = E[A^2] E[sin^2(x - b)] and E[y^2] - E[E[y|x]^2], with E[A^2] = 8.5033."""
    assert Sinusoids().predict_zero() == pytest.approx(4.2517, abs=5e-5)
    assert Sinusoids().best_unadapted() == pytest.approx(3.0057, abs=5e-5)


def test_sinusoid_constants_agree_with_integration_over_a_grid():
    """Midpoint rule over A, b and x of (A sin(x - b))^2, and of (A sin(x - b) + E[A] (2/pi) cos x)^2."""
    ranges = ((0.1, 5, 200), (0, torch.pi, 200), (-5, 5, 400))
    a, b, x = (lo + (hi - lo) * (torch.arange(n) + 0.5).double() / n for lo, hi, n in ranges)
    y = a[:, None, None] * torch.sin(x - b[:, None])
    assert (y**2).mean().item() == pytest.approx(Sinusoids().predict_zero(), rel=2e-4)
    around_mean = ((y + 2.55 * 2 / torch.pi * x.cos()) ** 2).mean().item()
    assert around_mean == pytest.approx(Sinusoids().best_unadapted(), rel=2e-4)


def test_sinusoid_constants_lie_within_five_standard_errors_of_simulation():
    drawn = Sinusoids().sample(200_000, shots=1, queries=1, generator=generator(3)).query
    fixed = -2.55 * 2 / torch.pi * drawn.x.cos()
    for guess, exact in ((0.0, Sinusoids().predict_zero()), (fixed, Sinusoids().best_unadapted())):
        error = (drawn.y - guess) ** 2
        assert abs(error.mean() - exact) < 5 * error.std() / len(error) ** 0.5


def test_sinusoid_constants_agree_with_simulation_on_another_family():
    family = Sinusoids(amplitude=(1.0, 2.0), phase=(0.3, 1.7), x=(-1.0, 4.0))
    drawn = family.sample(200000, shots=1, queries=1, generator=generator()).query
    assert (drawn.y**2).mean().item() == pytest.approx(family.predict_zero(), rel=0.01)
    waves = torch.cat([drawn.x.sin(), drawn.x.cos()], -1).squeeze(1)
    fit = waves @ torch.linalg.lstsq(waves, drawn.y[:, 0]).solution
    assert ((drawn.y[:, 0] - fit) ** 2).mean().item() == pytest.approx(family.best_unadapted(), rel=0.01)


def test_least_squares_is_exact_from_two_points():
    tasks = Sinusoids().sample(50, shots=2, queries=30, generator=generator())
    error = (least_squares(tasks.support, tasks.query.x) - tasks.query.y).abs().amax((1, 2))
    waves = torch.cat([tasks.support.x.sin(), tasks.support.x.cos()], -1)
    assert (error / torch.linalg.cond(waves)).max() < 1e-13


def test_the_same_generator_gives_the_same_tasks():
    first, second = (Sinusoids().sample(3, shots=2, queries=2, generator=generator(5)) for _ in range(2))
    assert torch.equal(first.query.y, second.query.y)
    other = Sinusoids().sample(3, shots=2, queries=2, generator=generator(6))
    assert not torch.equal(first.query.y, other.query.y)


def test_the_same_generator_gives_the_same_images_and_labels():
    options = {"ways": 4, "shots": 1, "queries": 2}
    first, second, other = (numbered().sample(5, **options, generator=generator(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for one, two in zip(first, second) for a, b in zip(one, two))
    assert not torch.equal(first.support.x, other.support.x)


def test_one_generator_gives_new_tasks_at_every_call():
    drawn, classes = generator(), numbered()
    first, second = (classes.sample(4, ways=5, shots=1, queries=1, generator=drawn) for _ in range(2))
    assert not torch.equal(first.support.x, second.support.x)


def test_a_supervised_batch_pairs_every_image_with_its_class():
    x, y = numbered().batch(500, generator=generator())
    assert torch.equal((255 * x[:, 0, 0, 0]).round().long(), y) and set(y.tolist()) == set(range(12))


def test_tasks_move_to_another_dtype_without_touching_labels():
    moved = numbered().sample(1, ways=2, shots=1, queries=1, generator=generator()).to(dtype=torch.float64)
    assert moved.query.x.dtype == torch.float64 and moved.query.y.dtype == torch.int64


def test_support_and_query_show_different_drawings_of_the_same_classes_with_one_label_each():
    tasks = numbered().sample(40, ways=5, shots=2, queries=3, generator=generator())
    for i in range(40):
        pairs = [(round(255 * x[0, 0, 0].item()), y.item()) for b in (tasks.support, tasks.query) for x, y in zip(b.x[i], b.y[i])]
        assert len(set(pairs)) == 5
        drawings = [(round(255 * x[0, 0, 0].item()), round(255 * x[0, 0, 1].item())) for b in (tasks.support, tasks.query) for x in b.x[i]]
        assert len(set(drawings)) == len(drawings)


def test_labels_say_nothing_about_classes():
    """Every class gets every label about equally often: chi-square over 5 labels stays small."""
    tasks = numbered(classes=5).sample(3000, ways=5, shots=1, queries=1, generator=generator())
    shown = (255 * tasks.support.x[:, :, 0, 0, 0]).round().long()
    counts = collections.Counter(zip(shown.flatten().tolist(), tasks.support.y.flatten().tolist()))
    assert all(abs(counts[c, y] - 600) < 5 * 600**0.5 for c in range(5) for y in range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 13, "shots": 1, "queries": 1}, "ways must be at most the 12 classes"),
        ({"ways": 5, "shots": 4, "queries": 3}, r"shots \+ queries must be at most 6 .* got 7"),
        ({"ways": 5, "shots": 0, "queries": 3}, "shots must be an integer >= 1, got 0"),
    ],
)
def test_impossible_tasks_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        numbered().sample(1, **options, generator=generator())


def test_sinusoids_refuse_no_shots():
    with pytest.raises(ValueError, match="shots must be an integer >= 1, got 0"):
        Sinusoids().sample(1, shots=0, queries=1, generator=generator())


def test_splits_of_the_glyphs_share_no_script_and_no_character():
    names = {split: load_strokes(scripts.split())[2] for split, scripts in SPLITS.items()}
    assert {k: len(v) for k, v in names.items()} == {"train": 1493, "val": 161, "test": 488}
    scripts = {split: {n.split("/")[0] for n in found} for split, found in names.items()}
    assert not scripts["train"] & scripts["val"] and not (scripts["train"] | scripts["val"]) & scripts["test"]


def test_squared_distance_equals_the_distance_to_every_pixel_up_to_the_reach():
    strokes = torch.rand(3, 48, 48, generator=generator()) < 0.01
    points = torch.stack(torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij"), -1).reshape(-1, 2)
    for image, found in zip(strokes, squared_distance(strokes)):
        ink = points[image.flatten()]
        exact = ((points[:, None] - ink[None]) ** 2).sum(-1).amin(1).clamp(max=81)
        assert torch.equal(found.flatten().long(), exact)


def test_glyphs_are_as_hard_for_pixels_as_real_handwriting():
    tasks = Glyphs("test").sample(300, ways=5, shots=1, queries=5, generator=generator(5))
    found = evaluate(NearestNeighbour(nn.Flatten()), {}, tasks)
    assert 35 < found.mean.item() < 45


def test_drawings_follow_from_the_seed_alone():
    field, rows = squared_distance(load_strokes(["Hebrew"])[0]), torch.arange(40)
    first, second, other = (draw(field, rows, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_drawings_are_white_strokes_on_black():
    images = Glyphs("val").images.float() / 255
    assert (images.amax((2, 3)) > 0.5).all()
    assert images.mean() < 0.2 and images[..., [0, -1], :].mean() < 0.02


def test_the_fonts_licences_travel_with_the_strokes():
    for name, words in (("LICENSE_DEJAVU", "Bitstream Vera"), ("LICENSE_STIX", "STIX Font")):
        assert words in (DATA.parent / name).read_text("utf-8")


def test_glyphs_refuse_an_unknown_split():
    with pytest.raises(ValueError, match=r"split must be one of .* got 'dev'"):
        Glyphs("dev")


@pytest.mark.slow
def test_the_shipped_strokes_are_what_the_command_builds(tmp_path):
    from metalearn_utils.tasks.glyphs_build import build

    assert build(tmp_path / "again.npz") == 1493 + 161 + 488
    with np.load(DATA) as kept, np.load(tmp_path / "again.npz") as made:
        assert all(np.array_equal(kept[name], made[name]) for name in kept.files)


@needs_omniglot
def test_omniglot_has_twenty_drawings_of_every_character():
    found = Omniglot(("Sanskrit", "Tagalog"))
    assert found.images.shape == (59, 20, 28, 28)
    assert {n.split("/")[0] for n in found.names} == {"Sanskrit", "Tagalog"}
    assert (found.images.amax((2, 3)) == 255).all()


@needs_omniglot
def test_real_handwriting_is_as_hard_for_pixels_as_published_here():
    """Katakana, Sanskrit and Tagalog, 5-way 1-shot: 39 %, plus or minus 1.2 from 300 tasks."""
    tasks = Omniglot(REAL).sample(300, ways=5, shots=1, queries=5, generator=generator(5))
    found = evaluate(NearestNeighbour(nn.Flatten()), {}, tasks)
    assert abs(found.mean.item() - 39.0) < 3


@needs_omniglot
def test_an_alphabet_that_two_archives_share_is_the_same_in_both():
    first, second = (omniglot._characters(FOLDER / archive) for archive in omniglot.ARCHIVES)
    shared = first.keys() & second.keys()
    assert {name.split("/")[0] for name in shared} == {"Greek", "Latin"}
    assert all((first[name] == second[name]).all() for name in shared)


def test_shrinking_keeps_the_share_of_ink_in_every_area():
    """A black square of 30 x 30 in 105 x 105 covers 8 x 8 of 28 x 28 pixels."""
    page = np.full((105, 105), 255, dtype=np.uint8)
    page[15:45, 30:60] = 0
    file = io.BytesIO()
    Image.fromarray(page).save(file, "PNG")
    expected = np.zeros((28, 28), dtype=np.uint8)
    expected[4:12, 8:16] = 255
    assert (omniglot.shrink(file.getvalue()) == expected).all()


@needs_omniglot
def test_omniglot_refuses_an_unknown_alphabet():
    with pytest.raises(ValueError, match="alphabets must be among .* got 'Klingon'"):
        Omniglot(("Klingon",))


def test_missing_data_say_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="must hold images_background_small1.zip"):
        Omniglot(folder=tmp_path)


def test_a_half_downloaded_archive_is_named(tmp_path):
    for name in omniglot.ARCHIVES:
        (tmp_path / name).write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DataError, match="images_background_small1.zip is damaged"):
        Omniglot(folder=tmp_path)


def test_a_damaged_download_is_refused_and_nothing_stays_behind(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with zipfile.ZipFile(source / omniglot.ARCHIVES[0], "w") as archive:
        archive.writestr("a.txt", "not omniglot")
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="expected SHA-256 .* got"):
        omniglot.fetch(omniglot.ARCHIVES[0], cache, source=source.as_uri() + "/")
    assert list(cache.iterdir()) == []


@needs_omniglot
def test_a_whole_download_is_kept_and_not_fetched_twice(tmp_path):
    kept = omniglot.fetch(omniglot.ARCHIVES[0], tmp_path / "cache", source=Path(FOLDER).resolve().as_uri() + "/")
    assert omniglot.digest(kept) == omniglot.SHA256[omniglot.ARCHIVES[0]]
    assert omniglot.fetch(omniglot.ARCHIVES[0], tmp_path / "cache", source="file:///nowhere/") == kept


def test_an_unreachable_source_is_named(tmp_path):
    with pytest.raises(DataError, match="could not be downloaded from"):
        omniglot.fetch(omniglot.ARCHIVES[0], tmp_path, source=(tmp_path / "absent").as_uri() + "/")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        omniglot.fetch(omniglot.ARCHIVES[0], blocked / "cache")
