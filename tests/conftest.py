"""Settings and fixtures that all tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from metalearn_utils import parallel  # noqa: E402

torch.set_num_threads(1)
INNER_LOOP = sys.modules["metalearn_utils.adapt"]


@pytest.fixture(autouse=True)
def every_step_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`recompute=True` on few steps too, so that small tests reach it."""
    monkeypatch.setattr(INNER_LOOP, "KEPT", 0)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch):
    """Call with "batched", "vmap" or "loop" to overrule how the library evaluates many tasks."""

    def overrule(kind: str) -> None:
        monkeypatch.setattr(parallel, "choose", lambda model, tasks: kind)

    return overrule


@pytest.fixture(params=["batched", "vmap", "loop"])
def every_path(request: pytest.FixtureRequest, force) -> str:
    """Run the test once for each way of evaluating many tasks."""
    force(request.param)
    return request.param
