"""Learned rules: exact meta-gradients, task independence, what a constant network is, and PyTorch's own LSTM cell."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import F64, assert_same, assert_slopes, seeded
from torch import Tensor
from torch.utils import _pytree as pytree
from training_cases import (
    HORIZON, LEARNED, RULES, THETA, bowls, flat, net_loss, net_problem, shaken, single, unflat,
)  # fmt: skip

from metalearn_utils import coordinatewise, learned, rates, unrolls
from metalearn_utils.adapt import Adapted, adapt
from metalearn_utils.coordinatewise import gated, lstm, per_parameter_mlp
from metalearn_utils.estimators import run, unrolled
from metalearn_utils.learned import step_size
from metalearn_utils.rates import hypergradient, per_layer, per_layer_and_step, schedule
from metalearn_utils.rules import Phi, UpdateRule, adam, momentum, sgd
from metalearn_utils.tasks.problems import Problem, Quadratics

PROBLEM = net_problem()


def alone(rule: UpdateRule, phi: Phi, task: int, steps: int = HORIZON, problem: Problem = PROBLEM) -> Adapted:
    """A run on one task without a task axis."""
    theta, data = single(problem, task)
    state = rule.init(theta)
    if "lr" in state and "L" in problem.facts:
        state = state | {"lr": 1 / problem.facts["L"][task]}
    return adapt(problem.loss, theta, data, rule, steps, phi=phi, state=state)


def assert_slopes_of_each(f: Callable[[Phi], float], phi: Phi, gradient: Phi) -> None:
    """Central differences for each tensor of phi by itself, so that a large one cannot hide a small one."""
    at, slopes = flat(phi), flat(gradient)
    for name, value in at.items():
        assert_slopes(lambda moved: f(unflat(at | moved, phi)), {name: value}, {name: slopes[name]}, 1e-6)


def check_stacked(name: str) -> None:
    """d/dε of the mean of f(θ_1), ..., f(θ_T) over steps and tasks, along φ + ε v."""
    rule = RULES[name]()
    found = unrolled(HORIZON)(rule, rule.phi, PROBLEM, None, seeded())
    with torch.no_grad():
        mean = lambda phi: run(rule, phi, PROBLEM, None, HORIZON)[0].mean().item()  # noqa: E731
        assert_slopes_of_each(mean, rule.phi, found.phi)


def check_alone(name: str) -> None:
    """The same for one task without a task axis, through `adapt`'s losses and last parameters."""
    rule = RULES[name]()

    def meta_loss(phi: Phi) -> Tensor:
        found = alone(rule, phi, 0)
        return found.losses.sum() + sum(v.square().sum() for v in found.params.values())

    leaves = pytree.tree_map(lambda v: v.clone().requires_grad_(), rule.phi)
    slopes = torch.autograd.grad(meta_loss(leaves), pytree.tree_leaves(leaves))
    with torch.no_grad():
        gradient = pytree.tree_unflatten(list(slopes), pytree.tree_flatten(leaves)[1])
        assert_slopes_of_each(lambda phi: meta_loss(phi).item(), rule.phi, gradient)


@pytest.mark.parametrize("name", RULES)
def test_meta_gradient_of_stacked_tasks_equals_finite_differences(name: str) -> None:
    check_stacked(name)


@pytest.mark.parametrize("name", RULES)
def test_meta_gradient_of_one_task_equals_finite_differences(name: str) -> None:
    check_alone(name)


def check_independence(name: str) -> None:
    """Stacked tasks: losses, parameters and state's scale are those of each task by itself."""
    rule = RULES[name]()
    losses, after = run(rule, rule.phi, PROBLEM, None, HORIZON)
    for task in range(len(PROBLEM)):
        found = alone(rule, rule.phi, task)
        assert_same({k: v[task] for k, v in after.params.items()}, found.params, 1e-12)
        assert torch.allclose(losses[:-1, task], found.losses[1:], rtol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_stacked_tasks_give_each_tasks_own_result(name: str) -> None:
    check_independence(name)


@pytest.mark.parametrize("name", RULES)
def test_float32_tasks_keep_their_dtype_and_phi_its_own(name: str) -> None:
    """Parameters and losses in float32, φ and its gradient in float64, equal to the float64 run to 1e-4."""
    single_precision = lambda tree: pytree.tree_map(torch.Tensor.float, tree)  # noqa: E731
    data, facts = lambda t: single_precision(PROBLEM.data(t)), single_precision(PROBLEM.facts)
    rule, problem = RULES[name](), Problem(single_precision(PROBLEM.theta), net_loss, data, facts)
    losses, after = run(rule, rule.phi, problem, None, HORIZON)
    assert {v.dtype for v in [losses, *after.params.values()]} == {torch.float32}
    found, expected = (unrolled(HORIZON)(rule, rule.phi, p, None, seeded()).phi for p in (problem, PROBLEM))
    assert {v.dtype for v in flat(found).values()} == {F64}
    assert_same(flat(found), flat(expected), 1e-4)


@pytest.mark.parametrize("name", LEARNED)
def test_a_rule_is_as_large_for_any_model(name: str) -> None:
    """The same phi trains a vector of 20 entries, unless its rates are named after the layers."""
    rule, problem = LEARNED[name](), Quadratics(20).sample(2, generator=seeded())
    if "layer" in name:
        with pytest.raises(KeyError, match="theta"):
            run(rule, rule.phi, problem, None, 3)
        return
    losses, _ = run(rule, rule.phi, problem, None, 3)
    assert losses.isfinite().all()
    assert losses.shape == (3, 2)


# What a constant network is.


def constant(rule: UpdateRule, *outputs: float) -> UpdateRule:
    """The rule whose network answers `outputs` to everything."""
    phi = {k: torch.zeros_like(v) for k, v in rule.phi.items()}
    last = max(k for k in phi if k.startswith("b"))
    return rule._replace(phi=phi | {last: torch.tensor(outputs, dtype=F64)})


FACTOR = 0.75 * math.tanh(-0.02)
STEPS = torch.arange(1, 51, dtype=F64)
FORCED: dict[str, tuple[UpdateRule, Callable[[float], UpdateRule]]] = {
    "untrained step size": (step_size(generator=seeded()), sgd),
    "untrained absolute step size": (step_size(scale_free=False, generator=seeded()), sgd),
    "untrained step size from the loss": (step_size(use_loss=True, generator=seeded()), sgd),
    "untrained step size and momentum": (step_size(momentum=True, generator=seeded()), partial(momentum, beta=0.5)),
    "untrained MLP": (per_parameter_mlp(base=0.05, generator=seeded()), lambda lr: adam(0.05 * lr)),
    "constant factor": (constant(step_size(), -0.02), lambda lr: sgd(lr * (FACTOR * STEPS).exp())),
    "constant absolute step size": (
        constant(step_size(scale_free=False), -0.4),
        lambda lr: sgd(lr * math.exp(-0.4)),
    ),
    "constant step size and momentum": (
        constant(step_size(scale_free=False, momentum=True), -1.0, 0.4),
        lambda lr: momentum(lr * math.exp(-1.0), 1 / (1 + math.exp(-0.4))),
    ),
    "constant MLP": (
        constant(per_parameter_mlp(base=0.05), 0.0, -0.4),
        lambda lr: adam(0.05 * lr * math.exp(-0.4)),
    ),
}


def check_forced(name: str) -> None:
    """max |θ_t - θ_t'| < 1e-12 after 50 steps, at the scale 1 / L of each task"""
    rule, ordinary = FORCED[name]
    problem = Quadratics(6, kappa=20.0).sample(3, generator=seeded())
    _, after = run(rule, rule.phi, problem, None, 50)
    for task, largest in enumerate(problem.facts["L"].tolist()):
        theta, data = single(problem, task)
        expected = adapt(problem.loss, theta, data[0], ordinary(1 / largest), 50).params
        assert_same({"theta": after.params["theta"][task]}, expected, 1e-12)


@pytest.mark.parametrize("name", FORCED)
def test_a_rule_forced_to_a_constant_is_the_hand_made_rule_for_50_steps(name: str) -> None:
    check_forced(name)


CONSTANT_RATES: dict[str, Callable[[], UpdateRule]] = {
    "schedule": lambda: schedule(0.2, 4, 50),
    "hypergradient without descent": lambda: hypergradient(0.2, 0.0),
    "additive hypergradient without descent": lambda: hypergradient(0.2, 0.0, multiplicative=False),
    "rates per layer": lambda: sgd(per_layer(0.2, THETA)),
    "rates per layer and step": lambda: per_layer_and_step(0.2, THETA, 50),
}


@pytest.mark.parametrize("name", CONSTANT_RATES)
def test_rates_that_are_all_equal_are_gradient_descent_for_50_steps(name: str) -> None:
    rule, (theta, data) = CONSTANT_RATES[name](), single(PROBLEM, 0)
    expected = adapt(net_loss, theta, data[0], sgd(0.2), 50).params
    assert_same(adapt(net_loss, theta, data[0], rule, 50).params, expected, 1e-12)


def test_gated_with_fixed_gates_is_gradient_descent_with_weight_decay() -> None:
    """W = 0: θ ← f θ - lr i g with f = σ(b_0) and i = σ(b_1), for 50 steps"""
    rule, (theta, data) = gated(), single(PROBLEM, 0)
    phi = {"w": torch.zeros(2, 7, dtype=F64), "b": torch.tensor([4.0, -1.0], dtype=F64)}
    keep, rate = torch.sigmoid(phi["b"])
    found, by_hand = adapt(net_loss, theta, data[0], rule, 50, phi=phi).params, theta
    for _ in range(50):
        leaves = {k: v.clone().requires_grad_() for k, v in by_hand.items()}
        grads = torch.autograd.grad(net_loss(leaves, data[0]), list(leaves.values()))
        by_hand = {k: keep * v - rate * g for (k, v), g in zip(by_hand.items(), grads)}
    assert_same(found, by_hand, 1e-12)


def test_an_untrained_gated_rule_starts_close_to_gradient_descent() -> None:
    """f = 0.9999 and i = 0.01 without W"""
    rule = gated(generator=seeded())
    assert torch.sigmoid(rule.phi["b"]).tolist() == pytest.approx([0.9999, 0.01], rel=1e-12)


# Scale.


def rescaled(problem: Problem, by: float) -> Problem:
    """The same problem with its loss multiplied."""
    return Problem(problem.theta, lambda p, d: by * problem.loss(p, d), problem.data, {"L": by * problem.facts["L"]})


def check_scale(rule: UpdateRule) -> None:
    """1000 f with lr / 1000 has the same parameters as f with lr, and 1000 times its losses."""
    losses, after = run(rule, rule.phi, PROBLEM, None, 20)
    many, scaled = run(rule, rule.phi, rescaled(PROBLEM, 1000.0), None, 20)
    assert_same(scaled.params, after.params, 1e-9)
    assert torch.allclose(many, 1000 * losses, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"momentum": True}, {"use_loss": True}])
def test_multiplying_the_loss_changes_nothing_for_a_scale_free_step_size(options: dict) -> None:
    check_scale(shaken(step_size(generator=seeded(2), **options), 0.05))


@pytest.mark.parametrize("options", [{}, {"momentum": True}, {"use_loss": True}])
def test_multiplying_the_loss_changes_the_articles_absolute_step_size(options: dict) -> None:
    """It sees log |g_t| itself, which moves by log 1000."""
    with pytest.raises(AssertionError):
        check_scale(shaken(step_size(scale_free=False, generator=seeded(2), **options), 0.05))


def test_a_multiplicative_hypergradient_is_scale_free_and_an_additive_one_is_not() -> None:
    """The cosine keeps its value when the loss is multiplied, the inner product grows with the square."""
    theta, data = single(PROBLEM, 0)

    def end(by: float, multiplicative: bool) -> dict[str, Tensor]:
        rule = hypergradient(0.1 / by, 0.02, multiplicative)
        return adapt(lambda p, d: by * net_loss(p, d), theta, data, rule, 10).params

    assert_same(end(1000.0, True), end(1.0, True), 1e-10)
    with pytest.raises(AssertionError):
        assert_same(end(1000.0, False), end(1.0, False), 1e-3)


def test_rotating_the_parameters_changes_nothing_for_a_step_size() -> None:
    """s_t holds inner products only: θ ← Q θ, A ← Q A Qᵀ gives the same losses."""
    problem, rule = Quadratics(6).sample(2, generator=seeded()), LEARNED["step size"]()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=seeded(5), dtype=F64)).Q
    matrix, centre = problem.data(0)
    turned = Problem(problem.theta, problem.loss, lambda t: (turn @ matrix @ turn.T, centre @ turn.T), problem.facts)
    losses = run(rule, rule.phi, problem, None, 20)[0]
    assert torch.allclose(run(rule, rule.phi, turned, None, 20)[0], losses, rtol=1e-9)


# The coordinatewise rules.


def torch_lstm(rule: UpdateRule, hidden: int) -> list[torch.nn.LSTMCell]:
    """Two cells of PyTorch with the rule's weights; of their two biases one is zero."""
    cells = [torch.nn.LSTMCell(2, hidden, dtype=F64), torch.nn.LSTMCell(hidden, hidden, dtype=F64)]
    for layer, cell in enumerate(cells, 1):
        w = rule.phi[f"w{layer}"]
        inputs = w.shape[1] - hidden
        values = {"weight_ih": w[:, :inputs], "weight_hh": w[:, inputs:], "bias_ih": rule.phi[f"b{layer}"]}
        cell.load_state_dict(values | {"bias_hh": torch.zeros(4 * hidden, dtype=F64)})
    return cells


def paper_features(g: Tensor, p: float = 10.0) -> Tensor:
    """(log|g| / p, sgn g) if |g| >= e^-p, else (-1, e^p g): appendix A of Andrychowicz et al. (2016), by numbers."""
    rows = []
    for v in g.tolist():
        large = abs(v) >= math.exp(-p)
        rows.append([math.log(abs(v)) / p, math.copysign(1.0, v)] if large else [-1.0, v * math.exp(p)])
    return torch.tensor(rows, dtype=F64)


def check_lstm() -> None:
    """Each coordinate of every tensor goes through the same two cells with a state of its own, for 6 steps."""
    rule = shaken(lstm(hidden=5, generator=seeded(3)), 0.1)
    cells, g = torch_lstm(rule, 5), seeded(4)
    state = rule.init({}) | {"loss": torch.zeros((), dtype=F64)}
    memory = [None, None]
    for _ in range(6):
        grads = {"a": torch.randn(2, 3, generator=g, dtype=F64), "b": 1e-6 * torch.randn(4, generator=g, dtype=F64)}
        x = paper_features(torch.cat([v.flatten() for v in grads.values()]))
        for layer, cell in enumerate(cells):
            memory[layer] = cell(x if layer == 0 else memory[0][0], memory[layer])
        u = 0.1 * (memory[1][0] @ rule.phi["w"].T + rule.phi["b"]).squeeze(-1)
        updates, state = rule.update(rule.phi, grads, state)
        assert_same(updates, {"a": u[:6].reshape(2, 3), "b": u[6:]}, 1e-6)


def test_the_lstm_is_two_cells_of_pytorch_on_the_papers_features() -> None:
    check_lstm()


def check_windows(name: str) -> None:
    """12 steps at once and 3 times 4 steps from where the last window ended"""
    rule = RULES[name]()
    whole, end = run(rule, rule.phi, PROBLEM, None, 12)
    parts, carry = [], None
    for _ in range(3):
        losses, carry = run(rule, rule.phi, PROBLEM, carry, 4)
        parts.append(losses)
    assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(carry.params[k], v) for k, v in end.params.items())


@pytest.mark.parametrize("name", [name for name in RULES if name != "rates per layer and step"])
def test_a_run_carried_over_several_windows_is_the_run_in_one_window(name: str) -> None:
    check_windows(name)


def test_coordinates_do_not_see_each_other_in_the_lstm() -> None:
    """Permuting the coordinates permutes the updates."""
    rule, order = LEARNED["LSTM"](), torch.tensor([3, 0, 2, 1])
    grads = torch.randn(4, generator=seeded(), dtype=F64)
    state = rule.init({}) | {"loss": torch.zeros((), dtype=F64)}
    found = [rule.update(rule.phi, {"w": g}, state)[0]["w"] for g in (grads, grads[order])]
    assert torch.allclose(found[1], found[0][order], rtol=1e-14)


def test_features_of_the_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """g, and running means of decay 0.5, 0.9, 0.99, over rms(g) and over Adam's root; their logs / 10; the clock."""
    g, t = torch.tensor([0.3, -2.0], dtype=F64), 1
    m = torch.stack([(1 - d) * g for d in (0.5, 0.9, 0.99)], -1)
    size, root = g.square().mean().sqrt().expand(2), g.abs()
    moments = torch.cat([g.unsqueeze(-1), m], -1)
    clock = torch.tanh(t / torch.tensor([10.0, 30.0, 100.0], dtype=F64) - 1).expand(2, 3)
    logs = torch.stack([size.log(), root.log()], -1) / 10
    expected = torch.cat([moments / size.unsqueeze(-1), moments / root.unsqueeze(-1), logs, clock], -1)
    seen, rule = [], per_parameter_mlp()
    spied = lambda right, phi, x, activation: (seen.append(x), right(phi, x, activation))[1]  # noqa: E731
    replaced(coordinatewise, "run_perceptron", spied)(monkeypatch)
    rule.update(rule.phi, {"w": g}, rule.init({"w": g}) | {"loss": torch.zeros((), dtype=F64)})
    assert torch.allclose(seen[0], expected, rtol=1e-12)


@pytest.mark.parametrize("name", LEARNED)
def test_meta_gradients_are_finite_where_the_gradient_vanishes(name: str) -> None:
    """f = ½ h x² started at its minimum: norms and roots of zero have no infinite derivative."""
    rule, problem = LEARNED[name](), bowls([[1.0, 2.0]], start=0.0)
    if "layer" in name:
        rule = rule._replace(phi={"lr": {"theta": rule.phi["lr"]["b"]}})
    found = unrolled(HORIZON)(rule, rule.phi, problem, None, seeded())
    assert found.loss.isfinite()
    assert all(v.isfinite().all() for v in flat(found.phi).values())


# Planted bugs.

Patch = Callable[[pytest.MonkeyPatch], None]


def replaced(module, name: str, change: Callable) -> Patch:
    """The function of that name, wrapped: change(right, *args)."""
    return lambda patch: patch.setattr(module, name, partial(change, getattr(module, name)))


def detached(right: Callable, phi: Phi, x: Tensor, *args) -> Tensor:
    """The network sees its inputs as constants: only a part of the meta-gradient is left."""
    return right(phi, x.detach(), *args)


def over_all_tasks(right: Callable, *args) -> Tensor:
    """Every task gets the mean over tasks."""
    found = right(*args)
    return found.mean(0, keepdim=True).expand_as(found) if args[-1] == 1 else found


def other_gates(right: Callable, w: Tensor, b: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Forget and input gate exchanged."""
    order = [1, 0, 2, 3]
    pick = lambda v: torch.cat([v.chunk(4)[i] for i in order])  # noqa: E731
    return right(pick(w), pick(b), *args)


BUGS: dict[str, tuple[Patch, Callable[[], None]]] = {
    "inputs of the step size detached": (
        replaced(learned, "run_perceptron", detached),
        lambda: check_stacked("step size"),
    ),
    "inputs of the MLP detached": (replaced(coordinatewise, "run_perceptron", detached), lambda: check_alone("MLP")),
    "inputs of the LSTM detached": (
        replaced(coordinatewise, "log_sign", lambda right, g: right(g.detach())),
        lambda: check_stacked("LSTM"),
    ),
    "agreement of gradients detached": (
        replaced(rates, "cosine", lambda right, *args: right(*args).detach()),
        lambda: check_stacked("hypergradient"),
    ),
    "a cosine over all tasks": (
        replaced(learned, "cosine", over_all_tasks),
        lambda: check_independence("step size"),
    ),
    "a mean square over all tasks": (
        replaced(coordinatewise, "rms", over_all_tasks),
        lambda: check_independence("MLP"),
    ),
    "the logarithm of the norm instead of the ratio": (
        replaced(learned, "_features", lambda right, g, m, state, *_: right(g, m, state, False, False)),
        lambda: check_scale(shaken(step_size(generator=seeded(2)), 0.05)),
    ),
    "half the change of a step size": (
        lambda patch: patch.setattr(learned, "LARGEST_CHANGE", 0.375),
        lambda: check_forced("constant factor"),
    ),
    "no bias correction": (
        replaced(coordinatewise, "safe_sqrt", lambda right, v: right(0.5 * v)),
        lambda: check_forced("untrained MLP"),
    ),
    "gates in another order": (replaced(coordinatewise, "_cell", other_gates), check_lstm),
    "features without the sign": (replaced(coordinatewise, "log_sign", lambda right, g: right(g).abs()), check_lstm),
    "a state that starts afresh in each window": (
        replaced(unrolls, "adapt", lambda right, *args, state, **flags: right(*args, **flags)),
        lambda: check_windows("momentum"),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_turns_its_check_red(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = BUGS[bug]
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
