"""Stored tables and weights: not stale, not foreign, and made by the command they name."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from metalearn_utils import load_weights, results, rule_files, weights
from metalearn_utils.recipes import RULES
from metalearn_utils.recreate import first_losses

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {p.stem: p for p in sorted((ROOT / "book").glob("*/results/*.py"))}
# Tables of whole trainings, whose tasks are dear: per entry the scores [seeds, tasks] and its trials.
TRAININGS = ("networks",)
TASKS = [name for name in COMMANDS if name not in TRAININGS]


def command(name: str):
    spec = importlib.util.spec_from_file_location(name, COMMANDS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", COMMANDS)
def test_no_table_is_stale(name):
    assert results.stale(name, command(name).depends()) == []


@pytest.mark.parametrize("name", TASKS)
def test_every_method_has_at_least_three_seeds_and_600_tasks(name):
    table = results.read(name)
    assert table["tasks"] >= 600
    seeds = {}
    for e in table["entries"]:
        seeds.setdefault((e["method"], e["shots"]), set()).add(e["seed"])
    assert all(len(s) >= 3 for (method, _), s in seeds.items() if "pixels" not in method)


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_have_three_seeds_eight_tasks_and_equal_trials_without_an_edge(name):
    entries = results.read(name)["entries"]
    assert all(len(row) >= 8 for e in entries for row in e["scores"])
    assert all(len(e["scores"]) >= 3 for e in entries if "tried" not in e)  # learned rules: one row per seed
    tuned = [e for e in entries if "tried" in e]
    assert len(tuned) > 9 and {len(e["tried"]) for e in tuned} == {results.read(name)["trials"]}
    assert not any(min(e["tried"]) == e["chosen"] or max(e["tried"]) == e["chosen"] for e in tuned)


@pytest.mark.parametrize("name", TASKS)
def test_trials_are_equal_in_number_and_no_choice_lies_at_an_edge(name):
    tuning = results.read(name)["tuning"]
    tried = [t.get("tried") or t["rates"] for t in tuning]
    assert len({len(options) for options in tried}) == 1
    at_edge = [t for t, options in zip(tuning, tried) if options.index(t["chosen"]) in (0, len(options) - 1)]
    assert at_edge == []


def test_a_changed_file_makes_a_table_stale(tmp_path, monkeypatch):
    code = tmp_path / "code.py"
    code.write_text("1")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    results.write(tmp_path / "tables" / "t.json", "make t", [code], {})
    assert results.stale("t", [code]) == []
    code.write_text("2")
    assert results.stale("t", [code]) == ["code.py"]


def test_a_kept_part_is_made_again_only_when_what_it_depends_on_changed(tmp_path):
    code, path, runs = tmp_path / "code.py", tmp_path / "cache" / "part.json", []

    def run():
        runs.append(1)
        return [len(runs), 0.1]

    code.write_text("1")
    assert results.kept(path, [code], run) == results.kept(path, [code], run) == [1, 0.1]
    code.write_text("2")
    assert results.kept(path, [code], run) == [2, 0.1]
    assert [p.name for p in path.parent.iterdir()] == ["part.json"]


def test_floats_come_back():
    text = base64.b64encode(torch.tensor([0.5, -3.0], dtype=torch.float32).numpy().tobytes()).decode()
    assert results.floats(text).tolist() == [0.5, -3.0]


def test_letters_hold_the_counts():
    counts = torch.tensor([0, 7, 25])
    assert results.decode(results.encode(counts)).tolist() == [0.0, 28.0, 100.0]


@pytest.mark.parametrize("name", weights.available())
def test_weights_are_small_and_described(name):
    assert (weights.FOLDER / f"{name}.pt").stat().st_size <= 150_000
    record = weights.describe(name)
    assert record["command"] == f"python -m metalearn_utils.recreate {name} --seed 0"
    assert record["cpu_seconds"] <= 120 and len(record["first_losses"]) == 50


@pytest.mark.parametrize("name", rule_files.available_rules())
def test_rules_are_small_and_described(name):
    assert (weights.FOLDER / f"{name}.pt").stat().st_size <= 50_000
    record, (recipe, seed) = weights.describe(name), name.rsplit("-s", 1)
    assert record["command"] == f"python -m metalearn_utils.recreate {recipe} --seed {seed}"
    assert record["cpu_seconds"] <= 120 and len(record["first_losses"]) == 50


def test_every_recipe_of_a_rule_ships_three_seeds():
    assert rule_files.available_rules() == sorted(f"{name}-s{seed}" for name in RULES for seed in range(3))


@pytest.mark.parametrize("name", RULES)
def test_the_first_iterations_of_a_rule_are_repeated(name):
    """Seed 0, in float64; another seed differs by a third. How far machines agree was measured with other instructions:
    an LSTM's training amplifies a rounding to 1e-4 by iteration 23, and steps beyond 2/L do so within one run."""
    iterations, rtol = (20, 5e-2) if "step-size" in name else (15, 1e-4) if "lstm" in name else (50, 1e-4)
    expected = torch.tensor(weights.describe(f"{name}-s0")["first_losses"])[:iterations]
    assert torch.allclose(torch.tensor(first_losses(name))[:iterations], expected, rtol=rtol)


@pytest.mark.parametrize("name", weights.available())
def test_the_first_fifty_iterations_are_repeated(name):
    """In float64, in which training agrees between machines; float32 would drift by several percent."""
    expected = torch.tensor(weights.describe(name)["first_losses"])
    assert torch.allclose(torch.tensor(first_losses(name)), expected, rtol=1e-4)


def test_unknown_weights_are_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="name must be one of .* got 'nothing'"):
        load_weights("nothing")


def test_records_are_json_without_machine_paths():
    for path in weights.FOLDER.glob("*.json"):
        assert "/" not in json.loads(path.read_text("utf-8"))["command"]
