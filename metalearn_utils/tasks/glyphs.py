"""Glyphs: characters of fonts, thinned to pen strokes and drawn anew with a random pen and a random hand.

The strokes are stored with the package (data/glyphs.npz), so that the images depend on no font renderer;
`python -m metalearn_utils.tasks.glyphs_build` makes the file from the fonts inside matplotlib.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .images import ImageClasses

DATA = Path(__file__).parent / "data" / "glyphs.npz"
SIDE, REACH = 48, 9
SPLITS = {
    "train": "Latin IPA LatinExtended Greek Coptic Cyrillic Lisu OldItalic MathLetters Letterlike MathOperators "
    "Arrows Technical MiscSymbols Dingbats Box Currency",
    "val": "Armenian Ogham Georgian Asomtavruli Nuskhuri",
    "test": "Hebrew Arabic Lao NKo Tifinagh Canadian",
}


@dataclass(frozen=True)
class Hand:
    """How a stroke is drawn: ranges of rotation (degrees), shear, scale, shift, elastic jitter and pen width (px)."""

    rotation: float = 20.0
    shear: float = 0.3
    scale: tuple[float, float] = (0.7, 1.1)
    shift: float = 0.1
    elastic: float = 0.12
    pen: tuple[float, float] = (0.8, 1.7)


class Glyphs(ImageClasses):
    """Characters of one split: scripts of "train", "val" and "test" are disjoint.

    Args:
        split: "train", "val" or "test".
        drawings: drawings per character, rendered once.
        seed: seed of the drawings.

    Raises:
        ValueError: an unknown split, or fewer than one drawing.
    """

    def __init__(self, split: str, drawings: int = 20, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
        if not isinstance(drawings, int) or drawings < 1:
            raise ValueError(f"drawings must be an integer >= 1, got {drawings!r}")
        super().__init__(*_drawn(split, drawings, seed))


@lru_cache(maxsize=8)
def _drawn(split: str, drawings: int, seed: int) -> tuple[Tensor, list[str]]:
    strokes, starts, names = load_strokes(SPLITS[split].split())
    generator = torch.Generator().manual_seed(seed)
    counts = starts.diff()
    font = (torch.rand(len(counts), drawings, generator=generator) * counts[:, None]).long() + starts[:-1, None]
    images = draw(squared_distance(strokes), font.flatten(), generator)
    return images.reshape(len(counts), drawings, 28, 28), names


def load_strokes(scripts: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    """The stored strokes of some scripts.

    Returns:
        strokes bool [bitmaps, 48, 48]; starts int64 [classes + 1], the rows of each class; names "Script/U+XXXX".
    """
    with np.load(DATA) as data:
        script, code, count = data["scripts"][data["script"]], data["code"], data["count"].astype(np.int64)
        bits = np.unpackbits(data["bits"], axis=1)
    keep = np.isin(script, scripts)
    strokes = torch.from_numpy(bits[np.repeat(keep, count)].reshape(-1, SIDE, SIDE).astype(bool))
    starts = torch.from_numpy(np.concatenate([[0], count[keep].cumsum()]))
    return strokes, starts, [f"{s}/U+{c:04X}" for s, c in zip(script[keep], code[keep])]


def squared_distance(strokes: Tensor) -> Tensor:
    """Squared distance to the nearest stroke pixel, capped at 81: uint8 [n, 48, 48] from bool [n, 48, 48]."""
    far = torch.full_like(strokes, REACH**2, dtype=torch.uint8).masked_fill_(strokes, 0)
    return _sweep(_sweep(far, 1), 2)


def _sweep(d: Tensor, axis: int) -> Tensor:
    out = d.clone()
    for shift in range(1, REACH):
        cost, n = shift * shift, d.shape[axis] - shift
        moved = d.clamp(max=REACH**2 - cost) + cost
        for to, source in ((0, shift), (shift, 0)):
            view = out.narrow(axis, to, n)
            torch.minimum(view, moved.narrow(axis, source, n), out=view)
    return out


def draw(field: Tensor, rows: Tensor, generator: torch.Generator, hand: Hand = Hand(), chunk: int = 4000) -> Tensor:
    """Draw strokes with a random hand, in float64, so that every machine rounds to the same picture.

    Args:
        field: squared distances, uint8 [bitmaps, 48, 48].
        rows: which bitmap each image shows, int64 [n].
        generator: source of the hand's variation.

    Returns:
        uint8 [n, 28, 28], white ink on black.
    """
    n = len(rows)
    affine, pen = _affine(n, hand, generator), _between(hand.pen, n, generator)
    bend = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64) * hand.elastic
    parts = [slice(i, i + chunk) for i in range(0, n, chunk)]
    return torch.cat([_ink(field[rows[p]].double().sqrt(), affine[p], bend[p], pen[p]) for p in parts])


def _ink(distance: Tensor, affine: Tensor, bend: Tensor, pen: Tensor) -> Tensor:
    grid = F.affine_grid(affine, [len(affine), 1, 28, 28], align_corners=False)
    grid = grid + F.interpolate(bend, size=(28, 28), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    distance = F.grid_sample(distance[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    ink = torch.sigmoid(2.5 * (pen[:, None, None] - distance))
    ink = ink / ink.amax((1, 2), keepdim=True).clamp_min(0.3)
    return (255 * ink).round().clamp(0, 255).to(torch.uint8)


def _affine(n: int, hand: Hand, generator: torch.Generator) -> Tensor:
    angle = _between((-hand.rotation, hand.rotation), n, generator) * math.pi / 180
    shear = _between((-hand.shear, hand.shear), n, generator)
    sx, sy = _between(hand.scale, n, generator), _between(hand.scale, n, generator)
    tx, ty = (_between((-hand.shift, hand.shift), n, generator) for _ in range(2))
    c, s = angle.cos(), angle.sin()
    top = torch.stack([c / sx, (s + shear * c) / sx, tx], 1)
    return torch.stack([top, torch.stack([-s / sy, (c - shear * s) / sy, ty], 1)], 1)


def _between(limits: tuple[float, float], n: int, generator: torch.Generator) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * torch.rand(n, generator=generator, dtype=torch.float64)
