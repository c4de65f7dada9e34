"""`LearnedOptimizer` in an ordinary training loop against the same rule as a function, step by step."""

from collections.abc import Callable

import pytest
import torch
from cases import F64
from deployment_cases import EVERY, LEARNED, READS_LOSS, deployed, functional, gap
from deployment_cases import leaves_of, problem, steps, tensors_of
from torch import nn
from torch.utils import _pytree as pytree

from metalearn_utils import optimizer
from metalearn_utils.adapt import adapt
from metalearn_utils.optimizer import LearnedOptimizer
from metalearn_utils.rules import per_parameter, sgd

STEPS = 12


def check_adapt(name: str, set_to_none: bool = True) -> None:
    """theta_k of the loop = theta_k of `adapt`, k = 1..12, whether gradients are set to None or to zero."""
    found, params, loss = deployed(EVERY[name])
    theta, _ = problem()
    expected = adapt(loss, theta, None, EVERY[name], STEPS).path[1:]
    assert gap(steps(found, params, loss, STEPS, set_to_none), expected) < 1e-12


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_every_rule_equals_adapt_step_by_step(name: str, set_to_none: bool) -> None:
    check_adapt(name, set_to_none)


@pytest.mark.parametrize("name", LEARNED)
def test_in_float32_it_equals_adapt_in_float32(name: str) -> None:
    theta, loss = problem(torch.float32)
    params = leaves_of(theta)
    found = steps(LearnedOptimizer(params.values(), LEARNED[name]), params, loss, 5)
    assert gap(found, adapt(loss, theta, None, LEARNED[name], 5).path[1:]) < 1e-6
    assert {v.dtype for v in params.values()} == {torch.float32}


def check_rates(name: str) -> None:
    """A schedule of the group's lr = the slot "lr" of a learned rule, or a factor on the updates of a fixed one."""
    found, params, loss = deployed(EVERY[name], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(found, lambda t: 1 / (1 + t))
    path = []
    for _ in range(6):
        path += steps(found, params, loss, 1)
        scheduler.step()
    theta, _ = problem()
    assert gap(path, functional(EVERY[name], theta, loss, [0.5 / (1 + t) for t in range(6)])) < 1e-12


@pytest.mark.parametrize("name", EVERY)
def test_a_scheduler_sets_the_scale_of_every_rule(name: str) -> None:
    check_rates(name)


@pytest.mark.parametrize("name", [name for name in LEARNED if name not in READS_LOSS])
def test_each_group_has_a_rule_of_its_own(name: str) -> None:
    """On a sum of two losses, one per group, each group moves as if it were alone."""
    theta, loss = problem()
    rates, copies = (1.0, 0.3), [leaves_of(theta), leaves_of(theta)]
    found = LearnedOptimizer([{"params": p.values(), "lr": r} for p, r in zip(copies, rates)], LEARNED[name])
    both = {f"{i}.{k}": v for i, params in enumerate(copies) for k, v in params.items()}
    path = steps(found, both, lambda _: loss(copies[0]) + loss(copies[1]), 5)
    for i, rate in enumerate(rates):
        alone = functional(LEARNED[name], theta, loss, [rate] * 5)
        assert gap([{k: p[f"{i}.{k}"] for k in theta} for p in path], alone) < 1e-12


@pytest.mark.parametrize("name", EVERY)
def test_a_closure_is_the_same_as_a_loss(name: str) -> None:
    found, params, loss = deployed(EVERY[name])

    def closure() -> torch.Tensor:
        found.zero_grad()
        value = loss(params)
        value.backward()
        return value

    path = []
    for _ in range(4):
        value = found.step(closure)
        path.append({k: v.detach().clone() for k, v in params.items()})
    twin, twins, _ = deployed(EVERY[name])
    assert gap(path, steps(twin, twins, loss, 4)) == 0
    assert value.requires_grad, "the closure's own value comes back"


@pytest.mark.parametrize("name", [name for name in EVERY if name not in READS_LOSS])
def test_rules_that_do_not_read_the_loss_need_none(name: str) -> None:
    """step() = step(loss=...) for them, bit for bit"""
    theta, loss = problem()
    paths: list[list] = []
    for given in (True, False):
        found, params, _ = deployed(EVERY[name])
        paths.append([])
        for _ in range(4):
            found.zero_grad()
            value = loss(params)
            value.backward()
            found.step(**({"loss": value} if given else {}))
            paths[-1].append({k: v.detach().clone() for k, v in params.items()})
    assert gap(*paths) == 0
    assert all(type(v) is torch.Tensor for v in tensors_of(dict(found.state)))


def test_a_number_is_a_loss_in_full_precision() -> None:
    """loss=0.1 is the float64 number, not its float32 neighbour."""
    paths = []
    for convert in (float, lambda v: torch.tensor(v, dtype=F64), lambda v: torch.tensor([v], dtype=F64)):
        found, params, loss = deployed(LEARNED["step_size, loss"])
        paths.append([])
        for t in range(4):
            found.zero_grad()
            loss(params).backward()
            found.step(loss=convert(0.1 + 0.1 / (t + 3)))
            paths[-1].append({k: v.detach().clone() for k, v in params.items()})
    assert gap(paths[0], paths[1]) == gap(paths[0], paths[2]) == 0


@pytest.mark.parametrize("name", READS_LOSS)
def test_a_loss_in_another_precision_is_read_in_that_of_the_parameters(name: str) -> None:
    """float32 weights: the float64 number of a float32 loss gives the same steps, bit for bit."""
    theta, loss = problem(torch.float32)
    paths = []
    for convert in (lambda v: v, lambda v: v.item(), torch.Tensor.double):
        params = leaves_of(theta)
        found = LearnedOptimizer(params.values(), LEARNED[name])
        paths.append([])
        for _ in range(4):
            found.zero_grad()
            value = loss(params)
            value.backward()
            found.step(loss=convert(value))
            paths[-1].append({k: v.detach().clone() for k, v in params.items()})
    assert gap(paths[0], paths[1]) == gap(paths[0], paths[2]) == 0


def test_one_rate_per_weight_goes_by_the_names_of_the_parameters() -> None:
    """Meta-SGD's rates on `named_parameters`."""
    theta, loss = problem()
    rule = sgd(per_parameter(0.05, theta))
    found, params, _ = deployed(rule)
    assert gap(steps(found, params, loss, 4), adapt(loss, theta, None, rule, 4).path[1:]) < 1e-12


def test_weights_that_are_changed_between_steps_are_seen() -> None:
    """`gated` shrinks the weights themselves: after a reset to theta_0 its update is that of theta_0."""
    rule = LEARNED["gated"]
    theta, loss = problem()
    found, params, _ = deployed(rule)
    steps(found, params, loss, 3)
    with torch.no_grad():
        for k, p in params.items():
            p.copy_(theta[k])
    state = found.state["group 0"]["slots"] | {"theta": theta, "loss": loss(params).detach()}
    grads = dict(zip(params, torch.autograd.grad(loss(params), list(params.values()))))
    updates, _ = rule.update(rule.phi, grads, state)
    after = steps(found, params, loss, 1)[0]
    assert all(torch.allclose(after[k], theta[k] + updates[k], rtol=1e-12) for k in theta)


def check_storage(name: str) -> None:
    """No tensor of the state lies in the memory of a gradient or of a weight."""
    found, params, loss = deployed(EVERY[name])
    for _ in range(2):
        steps(found, params, loss, 1, set_to_none=False)
        taken = {v.untyped_storage().data_ptr() for p in params.values() for v in (p, p.grad)}
        kept = [v.untyped_storage().data_ptr() for v in tensors_of(dict(found.state))]
        assert not taken.intersection(kept)


@pytest.mark.parametrize("name", EVERY)
def test_the_state_shares_no_memory_with_gradients_or_weights(name: str) -> None:
    check_storage(name)


@pytest.mark.parametrize("name", EVERY)
def test_no_graph_is_kept(name: str) -> None:
    """Neither in the weights nor in the state, also where phi requires a gradient."""
    rule = EVERY[name]
    phi = pytree.tree_map(lambda v: v.clone().requires_grad_(), rule.phi)
    found, params, loss = deployed(rule._replace(phi=phi))
    steps(found, params, loss, 2)
    assert all(p.is_leaf and p.requires_grad for p in params.values())
    assert not any(v.requires_grad for v in tensors_of([dict(found.state), found.rule.phi]))


@pytest.mark.parametrize("name", EVERY)
def test_everything_stays_on_the_device_of_the_parameters(name: str) -> None:
    """On the meta device, any stray CPU tensor with axes raises."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to("meta")
    found = LearnedOptimizer(net.parameters(), EVERY[name])
    for _ in range(3):
        found.zero_grad()
        loss = net(torch.ones(5, 3, device="meta")).square().mean()
        loss.backward()
        found.step(loss=loss)
    assert all(v.is_meta for v in tensors_of(found.state["group 0"]["slots"]) if v.dim())


@pytest.mark.parametrize("name", EVERY)
def test_each_group_has_a_device_of_its_own(name: str) -> None:
    groups = [nn.Parameter(torch.ones(3, 2, device=device)) for device in ("cpu", "meta")]
    found = LearnedOptimizer([{"params": [p]} for p in groups], EVERY[name])
    for _ in range(2):
        for p in groups:
            p.grad = torch.ones_like(p)
        found.step(loss=1.0)
    assert [found.state[f"group {i}"]["slots"]["step"] for i in (0, 1)] == [2, 2]


def shared_gradients(patch: pytest.MonkeyPatch) -> None:
    """The trap of public code: p.grad itself enters the state."""
    patch.setattr(optimizer, "_copied", dict)


def unfilled(slot: str, value) -> Callable:
    """A slot that is filled with a constant."""
    right = LearnedOptimizer._filled

    def filled(self, *given):
        state = right(self, *given)
        return state | {slot: value} if slot in state else state

    return lambda patch: patch.setattr(LearnedOptimizer, "_filled", filled)


def no_clock(patch: pytest.MonkeyPatch) -> None:
    right = LearnedOptimizer._apply
    patch.setattr(LearnedOptimizer, "_apply", lambda self, i, u, state: right(self, i, u, state | {"step": 0}))


BUGS = {
    "shared gradients, step size": (shared_gradients, lambda: check_adapt("step_size", set_to_none=False)),
    "shared gradients, hypergradient": (shared_gradients, lambda: check_adapt("hypergradient", set_to_none=False)),
    "shared gradients, memory": (shared_gradients, lambda: check_storage("step_size")),
    "loss 1": (unfilled("loss", torch.ones((), dtype=F64)), lambda: check_adapt("step_size, loss")),
    "loss 1, gated": (unfilled("loss", torch.ones((), dtype=F64)), lambda: check_adapt("gated")),
    "lr 1": (unfilled("lr", 1.0), lambda: check_rates("lstm")),
    "no clock": (no_clock, lambda: check_adapt("per_parameter_mlp")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_turns_its_check_red(bug: str, monkeypatch) -> None:
    plant, check = BUGS[bug]
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_shared_gradients_do_no_harm_while_they_are_set_to_none(monkeypatch) -> None:
    """Why the trap is easy to miss: with `zero_grad()` as it is today, every p.grad is a new tensor."""
    shared_gradients(monkeypatch)
    check_adapt("step_size", set_to_none=True)
