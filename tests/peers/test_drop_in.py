"""`LearnedOptimizer` with a fixed rule against `torch.optim`, in the same loop, with the same groups and schedulers."""

from collections.abc import Callable

import pytest
import torch
from deployment_cases import gap, leaves_of, problem, steps
from test_torch_optim import PAIRS
from torch.optim import lr_scheduler as schedulers

from metalearn_utils import guards, optimizer
from metalearn_utils.optimizer import LearnedOptimizer
from metalearn_utils.rules import adam, momentum, rmsprop, sgd

# Rules of rate 1, scaled by the group's lr, and their counterparts.
UNIT = {
    "sgd": (lambda: sgd(1.0), torch.optim.SGD, {}),
    "momentum": (lambda: momentum(1.0, 0.8), torch.optim.SGD, {"momentum": 0.8}),
    "rmsprop": (lambda: rmsprop(1.0), torch.optim.RMSprop, {}),
    "adam": (lambda: adam(1.0), torch.optim.Adam, {}),
}
SCHEDULERS: dict[str, Callable] = {
    "StepLR": lambda o: schedulers.StepLR(o, 7, 0.5),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 6),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=40, cycle_momentum=False),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.ExponentialLR(o, 0.9)], [5]
    ),
}


def path_of(make: Callable, count: int, schedule: Callable | None = None) -> list:
    """theta after each of `count` steps; the scheduler steps after each of them."""
    theta, loss = problem()
    params, path = leaves_of(theta), []
    found = make(params)
    scheduler = schedule(found) if schedule else None
    for _ in range(count):
        path += steps(found, params, loss, 1)
        if scheduler:
            scheduler.step()
    return path


@pytest.mark.parametrize("name", PAIRS)
def test_a_fixed_rule_equals_torch_optim_for_50_steps(name: str) -> None:
    """max |theta_t - theta_t'| < 1e-10 after each of 50 steps"""
    ours, theirs = PAIRS[name]
    found = path_of(lambda params: LearnedOptimizer(params.values(), ours()), 50)
    assert gap(found, path_of(lambda params: theirs(params.values()), 50)) < 1e-10


def check_scheduler(name: str, schedule: str) -> None:
    """The scheduler sets the group's lr, which multiplies the updates of a rule of rate 1."""
    rule, peer, settings = UNIT[name]
    found = path_of(lambda params: LearnedOptimizer(params.values(), rule(), lr=0.05), 30, SCHEDULERS[schedule])
    expected = path_of(lambda params: peer(params.values(), lr=0.05, **settings), 30, SCHEDULERS[schedule])
    assert gap(found, expected) < 1e-10


@pytest.mark.parametrize("name", UNIT)
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers_work_as_on_torch_optim(name: str, schedule: str) -> None:
    check_scheduler(name, schedule)


def test_a_plateau_lowers_the_rate() -> None:
    theta, loss = problem()
    params = leaves_of(theta)
    found = LearnedOptimizer(params.values(), sgd(1.0), lr=0.5)
    scheduler = schedulers.ReduceLROnPlateau(found, factor=0.1, patience=0)
    for value in (1.0, 1.0, 1.0):
        steps(found, params, loss, 1)
        scheduler.step(value)
    assert found.param_groups[0]["lr"] == pytest.approx(0.005)


def groups(params, lr: tuple[float, float] = (0.05, 0.01)) -> list[dict]:
    """Weights and biases in two groups; the first has its own rate, the second the default."""
    weights = [p for k, p in params.items() if k.endswith("weight")]
    return [{"params": weights, "lr": lr[0]}, {"params": [p for k, p in params.items() if k.endswith("bias")]}]


def check_groups(name: str) -> None:
    """Two groups with a rate and a state each."""
    rule, peer, settings = UNIT[name]
    found = path_of(lambda params: LearnedOptimizer(groups(params), rule(), lr=0.01), 30)
    assert gap(found, path_of(lambda params: peer(groups(params), lr=0.01, **settings), 30)) < 1e-10


@pytest.mark.parametrize("name", UNIT)
def test_parameter_groups_work_as_in_torch_optim(name: str) -> None:
    check_groups(name)


def check_added_group(name: str) -> None:
    """The biases join after five steps, with a fresh state."""

    def path(make: Callable) -> list:
        theta, loss = problem()
        params = leaves_of(theta)
        first, second = groups(params)
        found = make([first])
        path = steps(found, params, loss, 5)
        found.add_param_group(second)
        return path + steps(found, params, loss, 10)

    rule, peer, settings = UNIT[name]
    found = path(lambda given: LearnedOptimizer(given, rule(), lr=0.01))
    assert gap(found, path(lambda given: peer(given, lr=0.01, **settings))) < 1e-10


@pytest.mark.parametrize("name", UNIT)
def test_a_group_that_is_added_later_starts_afresh(name: str) -> None:
    check_added_group(name)


@pytest.mark.filterwarnings("ignore:parameters .* have no gradient")
@pytest.mark.parametrize("name", UNIT)
def test_parameters_without_gradient_stay_where_torch_optim_leaves_them(name: str) -> None:
    """An unused parameter stays; a group that has gradients in every third step moves in those steps only."""

    def path(make: Callable) -> list:
        theta, loss = problem()
        params = leaves_of(theta | {"unused.weight": torch.ones(2, dtype=torch.float64)})
        found, path = make(groups(params)), []
        for t in range(12):
            found.zero_grad()
            used = {k: v if t % 3 == 0 or k.endswith("weight") else v.detach() for k, v in params.items()}
            loss({k: v for k, v in used.items() if k in theta}).backward()
            found.step()
            path.append({k: v.detach().clone() for k, v in params.items()})
        return path

    rule, peer, settings = UNIT[name]
    found = path(lambda given: LearnedOptimizer(given, rule(), lr=0.01))
    assert gap(found, path(lambda given: peer(given, lr=0.01, **settings))) < 1e-10
    assert torch.equal(found[-1]["unused.weight"], torch.ones(2, dtype=torch.float64))
    bias = next(k for k in found[0] if k.endswith("bias"))
    moves = [not torch.equal(a[bias], b[bias]) for a, b in zip(found, found[1:])]
    assert moves == [False, False, True] * 3 + [False] * 2


def ignored_rate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizer, "check_lr", lambda lr: 1.0)


def rate_of_the_first_group(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizer, "check_lr", lambda lr, first=[]: (first.append(guards.check_lr(lr)), first[0])[1])


def forgotten_state(patch: pytest.MonkeyPatch) -> None:
    right = LearnedOptimizer._filled

    def fresh(self, i, *given):
        self.state.pop(f"group {i}", None)
        return right(self, i, *given)

    patch.setattr(LearnedOptimizer, "_filled", fresh)


def state_of_another_group(patch: pytest.MonkeyPatch) -> None:
    """A group that is added takes over the clock of the first."""
    right = LearnedOptimizer._filled

    def shared(self, i, *given):
        state = right(self, i, *given)
        return state | {"step": self.state["group 0"]["slots"]["step"]} if "group 0" in self.state else state

    patch.setattr(LearnedOptimizer, "_filled", shared)


BUGS = [
    (ignored_rate, lambda: check_scheduler("sgd", "StepLR")),
    (ignored_rate, lambda: check_groups("sgd")),
    (rate_of_the_first_group, lambda: check_groups("adam")),
    (forgotten_state, lambda: check_groups("momentum")),
    (forgotten_state, lambda: check_scheduler("adam", "StepLR")),
    (state_of_another_group, lambda: check_added_group("adam")),
]


@pytest.mark.parametrize(("plant", "check"), BUGS)
def test_a_planted_bug_turns_its_check_red(plant: Callable, check: Callable, monkeypatch) -> None:
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
