"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al. 2015), MIT licence.

The images come from a local folder (METALEARN_DATA, or shared/data/omniglot beside the checkout) or, on request
only, from the public repository into a cache.
"""

import hashlib
import io
import os
import tempfile
import urllib.request
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .images import ImageClasses

SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
ARCHIVES = ("images_background_small1.zip", "images_background_small2.zip")
SHA256 = {
    "images_background_small1.zip": "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    "images_background_small2.zip": "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
}
SIDE, DRAWINGS = 28, 20


class DataError(RuntimeError):
    """A data file is missing, damaged, or cannot be stored."""


class Omniglot(ImageClasses):
    """Characters of some alphabets; names are "Alphabet/characterNN".

    Args:
        alphabets: names such as "Katakana"; all that the two small background sets hold by default.
        folder: where the zip files lie; see `find_folder` for the default.
        download: fetch what is missing into the cache. Nothing is fetched unless you ask for it.

    Raises:
        DataError: no data, a damaged file, or a cache that cannot be written.
        ValueError: an alphabet that is not there.
    """

    def __init__(
        self, alphabets: tuple[str, ...] | None = None, folder: str | Path | None = None, download: bool = False
    ) -> None:
        folder = Path(folder) if folder is not None else find_folder()
        if download:
            folder = folder or cache_folder()
            for archive in ARCHIVES:
                fetch(archive, folder)
        if folder is None:
            raise DataError(
                "Omniglot is not here: set METALEARN_DATA to a folder that holds "
                f"{' and '.join(ARCHIVES)}, or call Omniglot(download=True)"
            )
        found = _read(folder)
        have = sorted({name.split("/")[0] for name in found})
        for alphabet in alphabets or ():
            if alphabet not in have:
                raise ValueError(f"alphabets must be among {have}, got {alphabet!r}")
        names = [name for name in sorted(found) if not alphabets or name.split("/")[0] in alphabets]
        super().__init__(torch.from_numpy(np.stack([found[name] for name in names])), names)


def find_folder() -> Path | None:
    """METALEARN_DATA, else shared/data/omniglot beside the checkout, else the cache, else None."""
    named = os.environ.get("METALEARN_DATA")
    if named:
        return Path(named)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "omniglot"
    return next((p for p in (beside, cache_folder()) if all((p / a).is_file() for a in ARCHIVES)), None)


def cache_folder() -> Path:
    """Where downloads go: XDG_CACHE_HOME or ~/.cache, then metalearn_utils."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metalearn_utils"


def fetch(archive: str, folder: Path, source: str = SOURCE) -> Path:
    """Download one archive, unless a whole one is there: to a temporary file, checked, then renamed."""
    target = folder / archive
    if target.is_file() and digest(target) == SHA256[archive]:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{archive}.")
    except OSError as error:
        raise DataError(f"folder {folder} cannot be written ({error}); choose another with XDG_CACHE_HOME") from error
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(source + archive, timeout=60) as answer:
            _copy(answer, file)
        if (got := digest(Path(name))) != SHA256[archive]:
            raise DataError(f"{archive} is damaged: expected SHA-256 {SHA256[archive]}, got {got}; try again")
        os.replace(name, target)
    except OSError as error:
        raise DataError(f"{archive} could not be downloaded from {source}: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while block := source.read(1 << 16):
        target.write(block)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=4)
def _read(folder: Path) -> dict[str, np.ndarray]:
    """All characters of the archives in a folder: name -> uint8 [20, 28, 28]; an alphabet in two archives once."""
    found: dict[str, np.ndarray] = {}
    for archive in ARCHIVES:
        path = folder / archive
        if not path.is_file():
            raise DataError(f"folder {folder} must hold {archive}, but it does not")
        try:
            found |= _characters(path)
        except (zipfile.BadZipFile, OSError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}): delete it and fetch it again") from error
    return found


def _characters(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        files: dict[str, list[str]] = {}
        for name in sorted(archive.namelist()):
            if name.endswith(".png"):
                files.setdefault("/".join(name.split("/")[1:3]), []).append(name)
        return {c: np.stack([shrink(archive.read(n)) for n in names[:DRAWINGS]]) for c, names in files.items()}


def shrink(png: bytes) -> np.ndarray:
    """A 105x105 drawing as uint8 [28, 28], white on black: the mean over each pixel's area, brightest pixel 255."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("L").point(lambda v: 255 - v).resize((SIDE, SIDE), Image.BOX)
    ink = np.asarray(image, dtype=np.float64)
    return np.round(255 * ink / max(ink.max(), 1)).astype(np.uint8)
