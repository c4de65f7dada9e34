"""Rule files: what is saved comes back, and what is not a rule is refused with the reason."""

import json
from pathlib import Path

import pytest
import torch
from cases import F64, seeded
from deployment_cases import deployed, functional, gap, noisy, problem, steps

from metalearn_utils import rule_files, weights
from metalearn_utils.coordinatewise import gated, lstm, per_parameter_mlp
from metalearn_utils.learned import step_size
from metalearn_utils.rates import decayed
from metalearn_utils.rule_files import FORMAT, RULES, available_rules, load_rule, save_rule, shapes
from metalearn_utils.rules import sgd

SETTINGS = {
    "step_size": [{}, {"scale_free": False}, {"momentum": True, "hidden": 5}, {"use_loss": True}],
    "per_parameter_mlp": [{}, {"base": 0.2, "use_time": False}, {"hidden": 4}],
    "lstm": [{}, {"hidden": 6, "scale": 0.01}],
    "gated": [{}],
}
CASES = [(kind, config) for kind, configs in SETTINGS.items() for config in configs]


def trained(kind: str, **config):
    """A rule with noise on phi, rounded to float32 as the file rounds it."""
    rule = noisy(RULES[kind](**config, generator=seeded()), 0.1)
    return rule._replace(phi={k: v.float().double() for k, v in rule.phi.items()})


def test_every_learned_rule_is_registered() -> None:
    assert RULES == {"step_size": step_size, "per_parameter_mlp": per_parameter_mlp, "lstm": lstm, "gated": gated}
    assert set(SETTINGS) == set(RULES)


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_what_is_saved_comes_back(kind: str, config: dict, tmp_path: Path) -> None:
    """phi is the float32 neighbour of what was saved, in float64; the loaded rule moves as the saved one."""
    rule, (theta, loss) = trained(kind, **config), problem()
    path = save_rule(tmp_path / "deep" / "rule.pt", rule, kind, **config)
    found = load_rule(str(path))
    assert found.phi.keys() == rule.phi.keys() and all(v.dtype == F64 for v in found.phi.values())
    assert all(torch.equal(v, rule.phi[k]) for k, v in found.phi.items())
    assert gap(functional(found, theta, loss, [1.0] * 4), functional(rule, theta, loss, [1.0] * 4)) == 0
    assert [p.name for p in path.parent.iterdir()] == ["rule.pt"]


def test_a_file_is_small_and_holds_plain_values_and_float32(tmp_path: Path) -> None:
    path = save_rule(tmp_path / "r.pt", trained("step_size", hidden=16), "step_size", hidden=16)
    stored = torch.load(path, weights_only=True)
    assert stored.keys() == {"format", "kind", "config", "phi"}
    assert (stored["format"], stored["kind"], stored["config"]) == (FORMAT, "step_size", {"hidden": 16})
    assert {v.dtype for v in stored["phi"].values()} == {torch.float32}
    assert path.stat().st_size < 10_000


def test_a_loaded_rule_drives_an_optimizer(tmp_path: Path) -> None:
    found, params, loss = deployed(load_rule(save_rule(tmp_path / "r.pt", trained("lstm"), "lstm")))
    steps(found, params, loss, 3)


def test_neither_saving_nor_loading_draws_from_the_global_generator(tmp_path: Path) -> None:
    """The reader's random numbers are those of a run without the rule."""
    rule = trained("lstm")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_rule(save_rule(tmp_path / "r.pt", rule, "lstm"))
    assert torch.equal(torch.rand(3), expected)


def test_shapes_name_every_tensor() -> None:
    assert shapes({"lr": {"a": torch.ones(2, 3)}, "beta": torch.ones(())}) == {"lr": {"a": [2, 3]}, "beta": []}


# Saving.


@pytest.mark.parametrize(
    ("rule", "kind", "config", "message"),
    [
        (lstm(), "gru", {}, r"kind must be one of \['gated', 'lstm', 'per_parameter_mlp', 'step_size'\], got 'gru'"),
        (lstm(), "lstm", {"hidden": 21}, "rule.phi is of another architecture: expected .* got"),
        (sgd(0.1), "gated", {}, "of another architecture: expected {'w': .2, 7., 'b': .2.}, got {'lr': ..}"),
        (lstm(), "lstm", {"layers": 2}, "config does not fit lstm: .* unexpected keyword argument 'layers'"),
        (lstm(), "lstm", {"hidden": 0}, "config does not fit lstm"),
        (lstm(), "lstm", {"hidden": "20"}, "config must hold plain numbers and booleans, got hidden='20'"),
        (lstm(), "lstm", {"scale": torch.tensor(0.1)}, "config must hold plain numbers and booleans, got scale=tensor"),
    ],
)
def test_a_rule_that_could_not_be_loaded_is_not_saved(rule, kind, config, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_rule(tmp_path / "r.pt", rule, kind, **config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        (trained("per_parameter_mlp", base=0.1), "per_parameter_mlp"),
        (trained("lstm", scale=0.2), "lstm"),
        (trained("step_size", scale_free=False), "step_size"),
        (decayed(trained("step_size"), 5), "step_size"),
    ],
)
def test_a_setting_that_no_shape_shows_must_be_given(rule, kind: str, tmp_path: Path) -> None:
    """The file would bring back a rule of the same shapes that moves otherwise."""
    with pytest.raises(ValueError, match=rf"rule moves otherwise than {kind}\(\): give all settings"):
        save_rule(tmp_path / "r.pt", rule, kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_weights_that_are_not_finite_in_float32_are_not_saved(value: float, tmp_path: Path) -> None:
    rule = trained("gated")
    rule.phi["b"][0] = value
    with pytest.raises(ValueError, match="rule.phi must be finite in float32, but 'b' is not"):
        save_rule(tmp_path / "r.pt", rule, "gated")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = save_rule(tmp_path / "r.pt", trained("gated"), "gated")
    before = path.read_bytes()

    def broken(value, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_rule(path, trained("gated"), "gated")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# Loading.


def test_a_missing_file_is_named_with_the_rules_that_ship(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    save_rule(tmp_path / "rule-demo.pt", trained("gated"), "gated")
    for source in ("rule-none", tmp_path / "none.pt", tmp_path):
        with pytest.raises(ValueError, match=r"a file or one of the shipped rules \['rule-demo'\], got '.*'"):
            load_rule(source)


def rewritten(tmp_path: Path, **changes) -> Path:
    """The file of a trained rule with parts changed, or left out (None)."""
    path = save_rule(tmp_path / "r.pt", trained("step_size"), "step_size")
    stored = torch.load(path, weights_only=True) | changes
    torch.save({k: v for k, v in stored.items() if v is not None}, path)
    return path


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = save_rule(tmp_path / "r.pt", trained("lstm"), "lstm")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="rule file .*r.pt is truncated or not a rule file"):
        load_rule(path)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"format": FORMAT, "kind": print}, tmp_path / "r.pt")
    with pytest.raises(ValueError, match="is truncated or not a rule file"):
        load_rule(tmp_path / "r.pt")


GOOD = {k: v.float() for k, v in trained("step_size").phi.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "metalearn_utils checkpoint 2"}, f"is foreign: expected format '{FORMAT}'"),
        ({"format": None}, f"is foreign: expected format '{FORMAT}'"),
        ({"kind": "gru"}, r"r.pt: kind must be one of \['gated'.*got 'gru'"),
        ({"kind": None}, "is damaged: kind is missing or of the wrong type"),
        ({"config": None}, "is damaged: config is missing or of the wrong type"),
        ({"phi": [1.0]}, "is damaged: phi is missing or of the wrong type"),
        ({"phi": {"w0": 1.0}}, "is damaged: phi must hold float32 tensors"),
        ({"phi": {k: v.double() for k, v in GOOD.items()}}, "is damaged: phi must hold float32 tensors"),
        ({"kind": "lstm"}, "r.pt: phi is of another architecture: expected {'w1'.* got {'w0'"),
        ({"config": {"hidden": 8}}, r"phi is of another architecture: expected {'w0': \[8, 3\].* got {'w0': \[16, 3\]"),
        ({"config": {"layers": 8}}, "r.pt: config does not fit step_size"),
        ({"config": {1: 8}}, "r.pt: config does not fit step_size"),
        ({"phi": GOOD | {"w0": GOOD["w0"].T}}, "r.pt: phi is of another architecture"),
        ({"phi": GOOD | {"b0": GOOD["b0"] * float("nan")}}, "r.pt: phi must be finite in float32, but 'b0' is not"),
    ],
)
def test_a_file_that_is_no_such_rule_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_rule(rewritten(tmp_path, **changes))


def test_weights_of_a_network_are_no_rule() -> None:
    with pytest.raises(ValueError, match="is foreign"):
        load_rule(weights.FOLDER / f"{weights.available()[0]}.pt")


# Rules that ship.


def test_shipped_rules_and_networks_are_listed_apart(tmp_path: Path, monkeypatch) -> None:
    """available() is what `load_weights` loads, available_rules() what `load_rule` loads; `describe` reads both."""
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    rule = trained("per_parameter_mlp", hidden=4)
    save_rule(tmp_path / "rule-mlp.pt", rule, "per_parameter_mlp", hidden=4)
    weights.save_weights("net", {"w": torch.ones(2)}, {"command": "none"}, tmp_path)
    (tmp_path / "rule-mlp.json").write_text(json.dumps({"command": "python"}), "utf-8")
    assert (weights.available(), available_rules()) == (["net"], ["rule-mlp"])
    assert torch.equal(load_rule("rule-mlp").phi["w0"], rule.phi["w0"])
    assert weights.describe("rule-mlp") == {"command": "python"}
    with pytest.raises(ValueError, match=r"name must be one of \['net'\], got 'rule-mlp'"):
        weights.load_weights("rule-mlp")


def test_shipped_rules_are_small_described_and_finite() -> None:
    for name in available_rules():
        assert (weights.FOLDER / f"{name}.pt").stat().st_size <= 150_000
        assert "command" in weights.describe(name)
        load_rule(name)


def test_the_check_sees_a_file_that_swaps_two_tensors(tmp_path: Path, monkeypatch) -> None:
    """Planted bug: the same names and shapes, but w1 transposed."""
    right = rule_files._read
    turned = lambda stored: stored | {"phi": stored["phi"] | {"w1": stored["phi"]["w1"].T}}  # noqa: E731
    monkeypatch.setattr(rule_files, "_read", lambda path: turned(right(path)))
    with pytest.raises(AssertionError):
        test_what_is_saved_comes_back("step_size", {}, tmp_path)


def test_the_check_sees_a_setting_that_is_lost(tmp_path: Path, monkeypatch) -> None:
    """Planted bug: settings are not read back."""
    right = rule_files._read
    monkeypatch.setattr(rule_files, "_read", lambda path: right(path) | {"config": {}})
    with pytest.raises(AssertionError):
        test_what_is_saved_comes_back("step_size", {"scale_free": False}, tmp_path)
