"""Settings: read once from the environment, printed in one line, refused when malformed."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

from metalearn_utils.settings import Settings, checkpoint_folder, require, settings, settings_now


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test reads the environment anew, and leaves nothing behind."""
    for name in ("METALEARN_MODE", "METALEARN_CUT"):
        monkeypatch.delenv(name, raising=False)
    settings_now.cache_clear()
    yield
    settings_now.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_quick_mode_is_the_default_and_stays_on_the_cpu_in_float64(gpu, capsys):
    found = settings()
    assert (found.mode, found.device.type, found.dtype, found.verified) == ("quick", "cpu", torch.float64, True)
    assert capsys.readouterr().out == "mode quick, device cpu, dtype float64\n"


def test_full_mode_takes_the_gpu_in_float32(gpu, monkeypatch, capsys):
    monkeypatch.setenv("METALEARN_MODE", "full")
    found = settings()
    assert (found.device.type, found.dtype, found.verified) == ("cuda", torch.float32, False)
    assert capsys.readouterr().out == "mode full, device cuda, dtype float32\n"


def test_full_mode_without_a_gpu_stays_on_the_cpu(monkeypatch):
    monkeypatch.setenv("METALEARN_MODE", "full")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings().device.type == "cpu"


def test_the_environment_is_read_once(monkeypatch):
    first = settings()
    monkeypatch.setenv("METALEARN_MODE", "full")
    assert settings() is first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.mode = "full"


def test_counts_follow_the_mode_and_the_cut(monkeypatch):
    cpu, double = torch.device("cpu"), torch.float64
    assert Settings("quick", cpu, double).count(1500, 70000) == 1500
    assert Settings("full", cpu, double).count(1500, 70000) == 70000
    monkeypatch.setenv("METALEARN_MODE", "full")
    monkeypatch.setenv("METALEARN_CUT", "2")
    assert settings().count(1500, 70000) == 2
    assert settings().count(1, 1) == 1


@pytest.mark.parametrize("changed", [{"mode": "full"}, {"device": torch.device("cuda")}, {"dtype": torch.float32}, {"cut": 2}])
def test_only_the_book_s_own_configuration_is_verified(changed):
    usual = Settings("quick", torch.device("cpu"), torch.float64)
    assert usual.verified and not dataclasses.replace(usual, **changed).verified


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("METALEARN_MODE", "fast", "METALEARN_MODE must be 'quick' or 'full', got 'fast'"),
        ("METALEARN_MODE", "", "METALEARN_MODE must be 'quick' or 'full', got ''"),
        ("METALEARN_CUT", "0", "METALEARN_CUT must be an integer >= 1, got '0'"),
        ("METALEARN_CUT", "two", "METALEARN_CUT must be an integer >= 1, got 'two'"),
    ],
)
def test_a_malformed_value_is_named(name, value, message, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        settings()


def test_a_missing_package_gives_one_line_that_says_how_to_install_it(monkeypatch):
    require("numpy")
    with pytest.raises(ModuleNotFoundError, match="needs no_such_package: pip install no_such_package"):
        require("no_such_package")
    with pytest.raises(ModuleNotFoundError, match="pip install no_such.sub"):
        require("no_such.sub")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="make learn2learn") as caught:
        require("learn2learn")
    assert "\n" not in str(caught.value)


def test_checkpoints_go_to_the_cache_on_an_own_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert checkpoint_folder() == tmp_path / "metalearn_utils" / "checkpoints"


def test_checkpoints_go_to_drive_on_colab_or_else_to_content_with_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) == "/content/drive/MyDrive")
    assert checkpoint_folder() == Path("/content/drive/MyDrive/metalearn_utils")
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with pytest.warns(UserWarning, match="lost when the runtime ends"):
        assert checkpoint_folder() == Path("/content/metalearn_utils")
