"""`LearnedOptimizer`: what it refuses, changing nothing; what it keeps; copies of it. Values: tests/oracles, peers."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from cases import F64
from deployment_cases import EVERY, LEARNED, READS_LOSS, deployed, gap, leaves_of, problem, steps, tensors_of
from torch import nn
from torch.utils import _pytree as pytree

from metalearn_utils.learned import step_size
from metalearn_utils.optimizer import LearnedOptimizer, NonFiniteGradient, NonFiniteUpdate
from metalearn_utils.rules import UpdateRule, adam, momentum, sgd


def weight(*shape: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, dtype=options.pop("dtype", F64)), **options)


# The constructor.


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "params is empty: expected parameters"),
        (iter(()), "params is empty: expected parameters"),
        ([weight(2, requires_grad=False)], "must hold a parameter that requires a gradient, got 1 that do not"),
        ([{"params": []}], "must hold a parameter that requires a gradient, got 0 that do not"),
        ([("net.w", weight(2, dtype=torch.float16))], "'net.w' must be float32 or float64, got torch.float16"),
        ([weight(2), weight(2, dtype=torch.bfloat16)], r"parameter '1' must be float32 or float64, got torch.bfloat16"),
        ([("w", weight(2)), ("w", weight(3))], r"params must not repeat a name within a group, got \['w', 'w'\]"),
    ],
)
def test_bad_parameters_are_refused(params, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer(params, sgd(0.1))


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), "0.1", True, None])
def test_a_bad_rate_is_refused_wherever_it_is_set(lr) -> None:
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got"):
        LearnedOptimizer([weight(2)], sgd(0.1), lr=lr)
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got"):
        LearnedOptimizer([{"params": [weight(2)], "lr": lr}], sgd(0.1))
    found, params, loss = deployed(sgd(0.1))
    found.param_groups[0]["lr"] = lr
    assert_unchanged(found, params, loss, ValueError, "lr must be a finite number >= 0, got")


@pytest.mark.parametrize("rule", [sgd, sgd(0.1).phi, None])
def test_something_else_than_a_rule_is_refused(rule) -> None:
    with pytest.raises(ValueError, match=r"rule must be an UpdateRule, e.g. adam\(0.001\), got"):
        LearnedOptimizer([weight(2)], rule)


def test_a_bad_group_is_not_added() -> None:
    found, params, loss = deployed(adam(0.1))
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got -1.0"):
        found.add_param_group({"params": [("w", weight(2))], "lr": -1.0})
    with pytest.raises(ValueError, match="parameter 'h' must be float32 or float64"):
        found.add_param_group({"params": [("h", weight(2, dtype=torch.float16))]})
    assert len(found.param_groups) == 1
    steps(found, params, loss, 1)


def test_numbers_of_nameless_parameters_count_through_all_groups() -> None:
    """As the numbers in a state_dict of `torch.optim` do."""
    groups = [{"params": [weight(2)]}, {"params": [weight(2), weight(2)]}]
    found = LearnedOptimizer(groups, sgd(0.1))
    for i, p in enumerate(p for group in groups for p in group["params"]):
        p.grad = torch.full_like(p, float("nan") if i == 2 else 1.0)
    with pytest.raises(NonFiniteGradient, match="the gradient of parameter '2' holds NaN"):
        found.step()


# Steps that are refused.


def assert_unchanged(found, params, loss: Callable, error: type, message: str, before: Callable = lambda: None) -> None:
    """A step raises and changes neither weights nor state."""
    found.zero_grad()
    value = loss(params)
    value.backward()
    before()
    kept = [v.detach().clone() for v in params.values()], copy.deepcopy(found.state_dict()["state"])
    with pytest.raises(error, match=message):
        found.step(loss=value)
    assert all(torch.equal(a, b) for a, b in zip(kept[0], params.values()))
    after = found.state_dict()["state"]
    assert kept[1].keys() == after.keys() and str(kept[1]) == str(after)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(kept[1]), tensors_of(after)))


def check_nonfinite(value: float, already: int) -> None:
    """One NaN in the last of two groups, before the first step or later."""
    theta, loss = problem()
    params = leaves_of(theta)
    named = list(params.items())
    found = LearnedOptimizer([{"params": named[:1]}, {"params": named[1:]}], momentum(0.1))
    steps(found, params, loss, already)
    name, last = named[-1]

    def spoil() -> None:
        last.grad.view(-1)[0] = value

    message = f"gradient of parameter '{name}' holds NaN or infinity .1 of {last.numel()} values.; nothing was changed"
    assert_unchanged(found, params, loss, NonFiniteGradient, message, spoil)
    assert gap([theta, *steps(found, params, loss, 1)], [theta, theta]) < 10, "it goes on after the bad batch"


@pytest.mark.parametrize("already", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_in_any_group(value: float, already: int) -> None:
    check_nonfinite(value, already)


def test_the_check_sees_a_group_that_moves_too_early(monkeypatch) -> None:
    """Planted bug: each group moves as soon as its own gradients are checked."""
    right = LearnedOptimizer._gradients

    def hasty(self, i):
        grads = right(self, i)
        self._apply(i, *self._move(i, grads, None))
        return grads

    monkeypatch.setattr(LearnedOptimizer, "_gradients", hasty)
    with pytest.raises(AssertionError):
        check_nonfinite(float("nan"), 0)


def test_nonfinite_gradients_are_value_errors() -> None:
    assert issubclass(NonFiniteGradient, ValueError) and issubclass(NonFiniteUpdate, ValueError)


def test_a_rule_that_overflows_says_so() -> None:
    """1e200 * 1e200 = inf: the gradient is finite, the update is not."""
    found, params, loss = deployed(sgd(1e200))
    name, first = next(iter(params.items()))

    def enlarge() -> None:
        first.grad.fill_(1e200)

    message = f"the update of parameter '{name}' holds NaN or infinity"
    assert_unchanged(found, params, loss, NonFiniteUpdate, message, enlarge)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    found = LearnedOptimizer(table.named_parameters(), sgd(0.1))
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of parameter 'weight' is sparse: .* sparse=False"):
        found.step()


def test_half_precision_gradients_are_refused() -> None:
    net = nn.Linear(2, 1)
    found = LearnedOptimizer(net.named_parameters(), sgd(0.1))
    net.to(torch.bfloat16)(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(ValueError, match="gradient of parameter 'weight' must be float32 or float64, got torch.bf"):
        found.step()


@pytest.mark.parametrize("name", READS_LOSS)
def test_a_rule_that_reads_the_loss_asks_for_it(name: str) -> None:
    found, params, loss = deployed(EVERY[name])
    loss(params).backward()
    before = [v.detach().clone() for v in params.values()]
    for give in (lambda: found.step(), lambda: found.step(lambda: None)):
        with pytest.raises(ValueError, match=r"the rule reads the loss: call step\(closure\).* or step\(loss=...\)"):
            give()
    assert all(torch.equal(a, b) for a, b in zip(before, params.values())) and not found.state


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.ones(2), r"loss must be one number, got shape \(2,\)"),
        ("1.0", "loss must be one number, got '1.0'"),
        (float("nan"), "loss must be finite for a rule that has a slot for it, got nan"),
        (torch.tensor(float("inf")), "loss must be finite for a rule that has a slot for it, got inf"),
    ],
)
def test_a_bad_loss_is_refused(loss, message: str) -> None:
    found, params, value = deployed(LEARNED["gated"])
    value(params).backward()
    with pytest.raises(ValueError, match=message):
        found.step(loss=loss)
    assert not found.state


def test_a_closure_and_a_loss_are_one_too_many() -> None:
    found, params, loss = deployed(sgd(0.1))
    with pytest.raises(ValueError, match="step takes a closure or a loss, got both"):
        found.step(lambda: loss(params), loss=1.0)


# Parameters without gradient.


class Spare(nn.Module):
    """A layer, one that is not used at first, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.frozen = (nn.Linear(2, 1, dtype=F64) for _ in range(3))
        self.frozen.requires_grad_(False)

    def loss(self, spare: bool = False, used: bool = True) -> torch.Tensor:
        x = torch.tensor([[1.0, -2.0]], dtype=F64)
        layers = [self.used] * used + [self.spare] * spare + [self.frozen]
        return sum(layer(x) for layer in layers).square().sum()


def stepped(found: LearnedOptimizer, loss: torch.Tensor) -> None:
    found.zero_grad()
    loss.backward()
    found.step(loss=loss)


@pytest.mark.parametrize("name", LEARNED)
def test_parameters_without_gradient_are_named_once_and_stay(name: str) -> None:
    net = Spare()
    found = LearnedOptimizer(net.named_parameters(), LEARNED[name])
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match=r"parameters \['spare.weight', 'spare.bias'\] have no gradient"):
        stepped(found, net.loss())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(found, net.loss())
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"used.weight", "used.bias"}


@pytest.mark.filterwarnings("ignore:parameters .* have no gradient")
def test_a_parameter_that_changes_sides_is_an_error() -> None:
    net = Spare()
    found = LearnedOptimizer(net.named_parameters(), LEARNED["step_size"])
    stepped(found, net.loss())
    with pytest.raises(ValueError, match="parameter 'spare.weight' has a gradient, but had none in the first step"):
        stepped(found, net.loss(spare=True))
    found.state.clear()
    stepped(found, net.loss(spare=True))
    with pytest.raises(ValueError, match="parameter 'used.weight' has no gradient, but had one in the first step"):
        stepped(found, net.loss(spare=True, used=False))


def test_a_group_of_its_own_may_lack_gradients() -> None:
    net = Spare()
    found = LearnedOptimizer([{"params": net.used.parameters()}, {"params": net.spare.parameters()}], sgd(0.01))
    for spare, used in ((False, True), (True, True), (True, False)):
        before = copy.deepcopy(net.state_dict())
        stepped(found, net.loss(spare=spare, used=used))
        moved = {k.split(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == set(["spare"] * spare + ["used"] * used)


def test_without_any_gradient_nothing_happens() -> None:
    found, params, _ = deployed(adam(0.1))
    found.zero_grad()
    assert found.step() is None and not found.state


# What is kept.


def saved(found: LearnedOptimizer) -> dict:
    """The state through a file, read weights-only."""
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_resumed(name: str, dtype: torch.dtype = F64, named: bool = True) -> None:
    """theta_3 .. theta_8 after a resume = theta_3 .. theta_8 of the uninterrupted run, bit for bit"""
    theta, loss = problem(dtype)
    runs = []
    for cut in (False, True):
        params = leaves_of(theta)
        given = (lambda: params.items()) if named else (lambda: params.values())  # noqa: B023
        found = LearnedOptimizer(given(), EVERY[name], lr=0.7)
        path = steps(found, params, loss, 3)
        if cut:
            state, params = saved(found), leaves_of(params)
            found = LearnedOptimizer(given(), EVERY[name])
            found.load_state_dict(state)
            assert found.param_groups[0]["lr"] == 0.7
        runs.append(path + steps(found, params, loss, 5))
    assert gap(*runs) == 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, dtype: torch.dtype) -> None:
    check_resumed(name, dtype)


def test_a_resumed_run_needs_no_names() -> None:
    check_resumed("lstm", named=False)


def test_the_check_sees_a_rounded_state(monkeypatch) -> None:
    """Planted bug: float64 in the state becomes float32, as torch casts a state to the dtype of its parameter."""
    right = LearnedOptimizer.state_dict

    def rounded(v):
        return v.float() if isinstance(v, torch.Tensor) else v

    monkeypatch.setattr(LearnedOptimizer, "state_dict", lambda self: pytree.tree_map(rounded, right(self)))
    with pytest.raises(AssertionError):
        check_resumed("adam")


def test_the_check_sees_a_state_that_is_lost(monkeypatch) -> None:
    """Planted bug: a resume starts the rule afresh."""
    right = LearnedOptimizer.state_dict
    monkeypatch.setattr(LearnedOptimizer, "state_dict", lambda self: right(self) | {"state": {}})
    with pytest.raises(AssertionError):
        check_resumed("step_size")


@pytest.mark.parametrize("name", EVERY)
def test_a_loaded_state_goes_to_the_device_of_the_parameters(name: str) -> None:
    found, params, loss = deployed(EVERY[name])
    steps(found, params, loss, 1)
    other = LearnedOptimizer([(k, nn.Parameter(v.detach().to("meta"))) for k, v in params.items()], EVERY[name])
    other.load_state_dict(found.state_dict())
    assert all(v.is_meta for v in tensors_of(dict(other.state)))
    assert not any(v.is_meta for v in tensors_of(dict(found.state)))


def test_a_state_dict_is_not_changed_by_later_steps() -> None:
    found, params, loss = deployed(LEARNED["lstm"])
    steps(found, params, loss, 2)
    state = found.state_dict()
    before = [v.clone() for v in tensors_of(state)]
    steps(found, params, loss, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state)))


def test_the_state_dict_holds_shapes_of_phi_and_no_phi() -> None:
    found, params, loss = deployed(LEARNED["step_size"])
    steps(found, params, loss, 1)
    state = found.state_dict()
    assert state["rule"]["w0"] == [16, 3] and state["rule"]["b2"] == [1]
    held = {v.data_ptr() for v in tensors_of(state)}
    assert not held.intersection(v.data_ptr() for v in tensors_of(found.rule.phi))


def test_the_state_of_something_else_is_refused() -> None:
    found, params, loss = deployed(LEARNED["step_size"])
    steps(found, params, loss, 1)
    with pytest.raises(ValueError, match="of another rule: expected a phi of shapes .* got {'w0': .16, 4.*"):
        found.load_state_dict(deployed(LEARNED["step_size, loss"])[0].state_dict())
    with pytest.raises(ValueError, match="state_dict is of another rule: .* got None"):
        found.load_state_dict(torch.optim.Adam(params.values()).state_dict())
    other = LearnedOptimizer([(k, weight(7)) for k in params], found.rule)
    with pytest.raises(ValueError, match=r"state_dict is of another model: '.*' had shape .* there, \[7\] here"):
        other.load_state_dict(found.state_dict())
    more = LearnedOptimizer([{"params": params.items()}, {"params": [("more", weight(2))]}], found.rule)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        more.load_state_dict(found.state_dict())


@pytest.mark.parametrize("name", EVERY)
def test_a_deep_copy_goes_on_alone_and_alike(name: str) -> None:
    found, params, loss = deployed(EVERY[name], lr=0.5)
    steps(found, params, loss, 2)
    twin, twins = copy.deepcopy((found, params))
    expected = steps(found, params, loss, 3)
    assert gap(steps(twin, twins, loss, 3), expected) == 0


def picklable_update(phi: dict, grads: dict, state: dict) -> tuple[dict, dict]:
    return {k: -phi["lr"] * g for k, g in grads.items()}, {"step": state["step"] + 1}


def picklable_init(theta: dict) -> dict:
    return {"step": 0}


def test_pickling_works_for_rules_that_are_no_closures() -> None:
    rule = UpdateRule({"lr": torch.tensor(0.1, dtype=F64)}, picklable_init, picklable_update)
    found, params, loss = deployed(rule)
    steps(found, params, loss, 2)
    twin, twins = pickle.loads(pickle.dumps((found, params)))
    assert gap(steps(twin, twins, loss, 3), steps(found, params, loss, 3)) == 0
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        pickle.dumps(deployed(step_size())[0])
