"""Build data/glyphs.npz from the fonts inside matplotlib: `python -m metalearn_utils.tasks.glyphs_build [FILE]`.

Each character is drawn in every text font that has it, thinned to strokes one pixel wide (Zhang and Suen 1984) and
packed as bits. Characters that look like an earlier one are left out. Needs matplotlib and Pillow.
"""

import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .glyphs import DATA, SIDE

FAMILIES = {
    "DejaVuSans": ["", "-Bold", "-Oblique", "-BoldOblique"],
    "DejaVuSerif": ["", "-Bold", "-Italic", "-BoldItalic"],
    "DejaVuSansMono": ["", "-Bold", "-Oblique", "-BoldOblique"],
    "STIXGeneral": ["", "Bol", "Italic", "BolIta"],
}
RANGES = {
    "Latin": [(0x41, 0x250)], "IPA": [(0x250, 0x2B0)],
    "LatinExtended": [(0x1D00, 0x1D2C), (0x1D62, 0x1DC0), (0x2C60, 0x2C80), (0xA720, 0xA800)],
    "Greek": [(0x370, 0x3E2), (0x3F0, 0x400)], "Coptic": [(0x3E2, 0x3F0)],
    "Cyrillic": [(0x400, 0x530), (0xA640, 0xA6A0)], "Lisu": [(0xA4D0, 0xA4F8)], "OldItalic": [(0x10300, 0x10324)],
    "MathLetters": [(0x1D504, 0x1D538), (0x1D49C, 0x1D4D0)], "Letterlike": [(0x2100, 0x214F)],
    "MathOperators": [(0x2200, 0x2300), (0x27C0, 0x27F0), (0x2980, 0x2B00)],
    "Arrows": [(0x2190, 0x2200), (0x27F0, 0x2800), (0x2900, 0x2980), (0x2B00, 0x2B60)],
    "Technical": [(0x2300, 0x2400)], "MiscSymbols": [(0x2600, 0x2700)], "Dingbats": [(0x2700, 0x27C0)],
    "Box": [(0x2500, 0x2580)], "Currency": [(0x20A0, 0x20D0)],
    "Armenian": [(0x531, 0x590)], "Ogham": [(0x1681, 0x169B)], "Georgian": [(0x10D0, 0x1100)],
    "Asomtavruli": [(0x10A0, 0x10D0)], "Nuskhuri": [(0x2D00, 0x2D30)],
    "Hebrew": [(0x5D0, 0x5EB)], "Arabic": [(0x620, 0x700)], "Lao": [(0xE80, 0xEE0)], "NKo": [(0x7C0, 0x7EB)],
    "Tifinagh": [(0x2D30, 0x2D68)], "Canadian": [(0x1401, 0x1680)],
}  # fmt: skip
COMPOSED = ("MathLetters", "Letterlike")
ALPHABETS = ("Latin", "LatinExtended", "Cyrillic", "Greek", "IPA")
ALIKE, FEWEST_PIXELS = 0.90, 12


def characters(script: str) -> list[int]:
    """Code points of a script: no accents, no ligatures, no combining or unassigned ones."""
    points = [c for lo, hi in RANGES[script] for c in range(lo, hi)]
    return [c for c in points if _wanted(script, chr(c))]


def _wanted(script: str, char: str) -> bool:
    name, category = unicodedata.name(char, ""), unicodedata.category(char)
    if not name or category[0] in "MCZ" or (unicodedata.decomposition(char) and script not in COMPOSED):
        return False
    return script not in ALPHABETS or not (" WITH " in name or category in ("Lm", "Sk", "Sm", "Po"))


def bitmap(font, char: str) -> np.ndarray | None:
    """A character as uint8 [48, 48], its longer side scaled to 38 pixels and centred; None if it has no ink."""
    from PIL import Image

    mask = font.getmask(char, mode="L")
    w, h = mask.size
    if w == 0 or h == 0 or (w < 3 and h < 3):
        return None
    scale = 38 / max(w, h)
    image = Image.frombytes("L", (w, h), bytes(mask))
    image = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.BILINEAR)
    page = Image.new("L", (SIDE, SIDE))
    page.paste(image, ((SIDE - image.size[0]) // 2, (SIDE - image.size[1]) // 2))
    return np.asarray(page)


def thin(strokes: np.ndarray) -> np.ndarray:
    """Zhang-Suen thinning of bool [n, 48, 48] until nothing changes (at most 40 rounds)."""
    out, active = strokes.copy(), np.arange(len(strokes))
    for _ in range(40):
        before = out[active]
        after = _peel(_peel(before, 0), 1)
        out[active] = after
        active = active[(after != before).any((1, 2))]
        if not len(active):
            break
    return out


def _peel(x: np.ndarray, phase: int) -> np.ndarray:
    p = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    around = [(0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
    n = [p[:, a : a + SIDE, b : b + SIDE] for a, b in around]
    ink = sum(v.astype(np.uint8) for v in n)
    turns = sum((~n[i] & n[(i + 1) % 8]).astype(np.uint8) for i in range(8))
    first, second = ((0, 2, 4), (2, 4, 6)) if phase == 0 else ((0, 2, 6), (0, 4, 6))
    open_sides = ~(n[first[0]] & n[first[1]] & n[first[2]]) & ~(n[second[0]] & n[second[1]] & n[second[2]])
    return x & ~((ink >= 2) & (ink <= 6) & (turns == 1) & open_sides)


def distinct(first: np.ndarray) -> list[int]:
    """Indices of classes whose first stroke image has enough ink and looks like no earlier one."""
    x = torch.from_numpy(first).float()[:, None]
    x = F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(x, 5, 1, 2), 5, 1, 2), 2).flatten(1)
    x = F.normalize(x - x.mean(1, keepdim=True), dim=1)
    alike, ink, kept = x @ x.T, first.sum((1, 2)), []
    for i in range(len(first)):
        if ink[i] >= FEWEST_PIXELS and not (kept and alike[i, kept].max() > ALIKE):
            kept.append(i)
    return kept


def render() -> list[tuple[str, int, np.ndarray]]:
    """Every (script, code point, thinned bitmaps [fonts, 48, 48]) that some font has, in a fixed order."""
    found = []
    fonts = [_font(family + style) for family, styles in FAMILIES.items() for style in styles]
    for script in RANGES:
        for code in characters(script):
            drawn = [bitmap(font, chr(code)) for font, has in fonts if code in has]
            drawn = [d for d in drawn if d is not None]
            if drawn:
                found.append((script, code, np.stack(drawn) > 96))
    strokes = np.split(thin(np.concatenate([f[2] for f in found])), np.cumsum([len(f[2]) for f in found])[:-1])
    return [(script, code, s) for (script, code, _), s in zip(found, strokes)]


def _font(name: str):
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

    path = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf")
    return ImageFont.truetype(path, 40), set(FT2Font(path).get_charmap())


def build(target: Path = DATA) -> int:
    """Write the file; returns the number of classes."""
    found = render()
    kept = [found[i] for i in distinct(np.stack([strokes[0] for _, _, strokes in found]))]
    scripts = list(RANGES)
    np.savez_compressed(
        target,
        scripts=np.array(scripts),
        script=np.array([scripts.index(s) for s, _, _ in kept], dtype=np.uint8),
        code=np.array([c for _, c, _ in kept], dtype=np.int32),
        count=np.array([len(s) for _, _, s in kept], dtype=np.uint8),
        bits=np.concatenate([np.packbits(s.reshape(len(s), -1), axis=1) for _, _, s in kept]),
    )
    return len(kept)


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)} characters")
