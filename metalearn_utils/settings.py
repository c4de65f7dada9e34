"""Where and how large a notebook runs: METALEARN_MODE=quick (default) or full, read once."""

import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

HOW_TO_INSTALL = {
    "learn2learn": "run `make learn2learn` (a C compiler is needed; requirements-learn2learn.txt says how without make)"
}


@dataclass(frozen=True)
class Settings:
    """The configuration of a run.

    Attributes:
        mode: "quick" (the book's stored outputs: CPU, float64) or "full" (a GPU in float32 if there is one).
        device, dtype: for tasks and parameters.
        cut: METALEARN_CUT, a bound on every count: METALEARN_MODE=full METALEARN_CUT=2 tests full mode in seconds.
    """

    mode: str
    device: torch.device
    dtype: torch.dtype
    cut: int | None = None

    @property
    def verified(self) -> bool:
        """Whether this is the configuration in which the book's claims are checked."""
        usual = self.mode == "quick" and self.device.type == "cpu" and self.dtype == torch.float64
        return usual and self.cut is None

    def count(self, quick: int, full: int) -> int:
        """A number of iterations or tasks: `quick`, or in full mode `full`."""
        wanted = quick if self.mode == "quick" else full
        return wanted if self.cut is None else min(wanted, self.cut)

    def __str__(self) -> str:
        return f"mode {self.mode}, device {self.device}, dtype {str(self.dtype).removeprefix('torch.')}"


@lru_cache(maxsize=1)
def settings_now() -> Settings:
    """The settings, read from the environment the first time."""
    mode = os.environ.get("METALEARN_MODE", "quick")
    if mode not in ("quick", "full"):
        raise ValueError(f"METALEARN_MODE must be 'quick' or 'full', got {mode!r}")
    gpu = mode == "full" and torch.cuda.is_available()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.float32 if gpu else torch.float64
    return Settings(mode, device, dtype, _cut())


def settings() -> Settings:
    """The settings of this run; prints them in one line."""
    found = settings_now()
    print(found)
    return found


def require(name: str) -> None:
    """Stop with one clear line if a package that a page needs is missing.

    Raises:
        ModuleNotFoundError: it is missing; the message says how to install it.
    """
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ModuleNotFoundError(f"this page needs {name}: {HOW_TO_INSTALL.get(name, f'pip install {name}')}")


def checkpoint_folder() -> Path:
    """Where long runs keep their checkpoints: Drive on Colab if it is mounted, else a local folder."""
    if "google.colab" not in sys.modules:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metalearn_utils" / "checkpoints"
    drive = Path("/content/drive/MyDrive")
    if drive.is_dir():
        return drive / "metalearn_utils"
    warnings.warn("Drive is not mounted: checkpoints in /content are lost when the runtime ends", stacklevel=2)
    return Path("/content/metalearn_utils")


def _cut() -> int | None:
    text = os.environ.get("METALEARN_CUT")
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"METALEARN_CUT must be an integer >= 1, got {text!r}")
    return int(text)
