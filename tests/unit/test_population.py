"""Many copies of a rule as one batch: each copy's result is that of its phi alone."""

import weakref
from dataclasses import replace

import pytest
import torch
from cases import F64, assert_same, seeded
from torch.utils import _pytree as pytree
from training_cases import HORIZON, RULES, net_problem, shaken, single

from metalearn_utils import population as stacking
from metalearn_utils.adapt import adapt
from metalearn_utils.estimators import es, run
from metalearn_utils.population import antithetic, population, repeat
from metalearn_utils.rules import Phi, UpdateRule, momentum, rmsprop, sgd
from metalearn_utils.tasks.problems import Problem, Quadratics

COPIES = 4
MORE = RULES | {
    "rmsprop": lambda: rmsprop(0.05, 0.9),
    "nesterov": lambda: momentum(0.1, 0.8, nesterov=True),
    "one rate per step": lambda: sgd(torch.tensor([0.3, 0.2, 0.1, 0.2], dtype=F64)),
}


def different(rule: UpdateRule) -> Phi:
    """COPIES values of phi, stacked."""
    values = [shaken(rule, 0.03, seed).phi for seed in range(COPIES)]
    return pytree.tree_map(lambda *v: torch.stack(v), *values)


def check(name: str) -> None:
    """Losses and parameters of copy i and task j stand at i * tasks + j, and equal a run with that phi alone."""
    rule, problem = MORE[name](), net_problem()
    phi = different(rule)
    losses, after = run(population(rule, COPIES), phi, repeat(problem, COPIES), None, HORIZON)
    assert losses.shape == (HORIZON, COPIES * len(problem))
    for i in range(COPIES):
        mine = slice(i * len(problem), (i + 1) * len(problem))
        expected, alone = run(rule, pytree.tree_map(lambda v, i=i: v[i], phi), problem, None, HORIZON)
        assert torch.allclose(losses[:, mine], expected, rtol=1e-10)
        assert_same({k: v[mine] for k, v in after.params.items()}, alone.params, 1e-11)
    assert losses.reshape(HORIZON, COPIES, -1).std(1).min() > 0, "the copies differ"


@pytest.mark.parametrize("name", MORE)
def test_a_population_equals_a_loop_over_its_values_of_phi(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", ["adam", "step size", "LSTM"])
def test_a_population_is_differentiable_in_every_copys_phi(name: str) -> None:
    """The gradient of the sum over copies holds each copy's own gradient."""
    rule, problem = MORE[name](), net_problem()
    phi = pytree.tree_map(lambda v: v.requires_grad_(), different(rule))
    losses, _ = run(population(rule, COPIES), phi, repeat(problem, COPIES), None, HORIZON)
    found = torch.autograd.grad(losses.sum(), pytree.tree_leaves(phi))
    for i in range(COPIES):
        one = pytree.tree_map(lambda v, i=i: v[i].detach().clone().requires_grad_(), phi)
        slopes = torch.autograd.grad(run(rule, one, problem, None, HORIZON)[0].sum(), pytree.tree_leaves(one))
        assert_same({k: v[i] for k, v in enumerate(found)}, dict(enumerate(slopes)), 1e-9)


def test_400_rates_as_one_batch_equal_single_runs() -> None:
    """A sweep over a learning rate, on one task without a loop."""
    rates, problem = torch.linspace(0.01, 0.5, 400, dtype=F64), net_problem(1)
    losses, _ = run(population(sgd(), 400), {"lr": rates}, repeat(problem, 400), None, HORIZON)
    theta, data = single(problem, 0)
    for i in (0, 217, 399):
        expected = adapt(problem.loss, theta, data, sgd(rates[i].item()), HORIZON).losses
        assert torch.allclose(losses[:-1, i], expected[1:], rtol=1e-11)


def test_repeated_problems_stand_one_copy_after_the_other() -> None:
    problem = net_problem(3)
    many = repeat(problem, 2)
    assert len(many) == 6
    assert torch.equal(many.theta["w"], torch.cat([problem.theta["w"]] * 2))
    assert torch.equal(many.data(5)[0], torch.cat([problem.data(5)[0]] * 2))
    assert torch.equal(many.facts["L"], torch.cat([problem.facts["L"]] * 2))
    assert torch.equal(many.loss(many.theta, many.data(0)), problem.loss(problem.theta, problem.data(0)).repeat(2))


def test_repeated_problems_follow_their_data() -> None:
    """Other examples at every step, in any order, or the same ones throughout."""
    changing, fixed = repeat(net_problem(2), 3), Quadratics(3, 5.0).sample(2, generator=seeded())
    for t in (0, 1, 1, 0):
        assert torch.equal(changing.data(t)[0], net_problem(2).data(t)[0].repeat(3, 1, 1))
    staying = repeat(fixed, 3)
    for t in (0, 5):
        assert torch.equal(staying.data(t)[0], fixed.data(t)[0].repeat(3, 1, 1))


def test_perturbations_follow_the_dtype_and_come_from_the_generator_alone() -> None:
    """float32 phi gets the float64 draws, rounded."""
    double, single_precision = {"w": torch.ones(3, dtype=F64)}, {"w": torch.ones(3)}
    (_, a), (_, b) = (antithetic(phi, 2, 0.1, seeded(1)) for phi in (double, single_precision))
    assert b["w"].dtype == torch.float32
    assert torch.allclose(a["w"].float(), b["w"], rtol=1e-6)
    assert not torch.equal(a["w"], antithetic(double, 2, 0.1, seeded(2))[1]["w"])


def test_copies_that_are_interleaved_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: phi of copy i meets the tasks of another copy."""

    def interleaved(problem: Problem, copies: int) -> Problem:
        mix = lambda tree: pytree.tree_map(lambda v: v.repeat_interleave(copies, 0), tree)  # noqa: E731
        return Problem(mix(problem.theta), problem.loss, lambda t: mix(problem.data(t)), mix(problem.facts))

    monkeypatch.setitem(globals(), "repeat", interleaved)
    with pytest.raises(AssertionError):
        check("sgd")


def test_one_phi_for_all_copies_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: every copy uses the first one's phi."""
    right = stacking.vmap
    first = lambda phi: pytree.tree_map(lambda v: v[:1].expand_as(v), phi)  # noqa: E731
    monkeypatch.setattr(stacking, "vmap", lambda f: lambda phi, *tensors: right(f)(first(phi), *tensors))
    with pytest.raises(AssertionError):
        check("adam")


def test_evolution_strategies_hold_few_steps_in_memory_whatever_the_horizon() -> None:
    """Data of different steps that are alive together: as many for 80 steps as for 20."""

    def most_alive(horizon: int) -> int:
        alive, most = weakref.WeakSet(), [0]

        def data(t: int) -> tuple[torch.Tensor, torch.Tensor]:
            fresh = tuple(v.clone() for v in problem.data(t))
            alive.add(fresh[0])
            most[0] = max(most[0], len(alive))
            return fresh

        problem = Quadratics(4).sample(2, generator=seeded(0))
        rule = sgd(0.1)
        es(horizon, 2, 0.01)(rule, rule.phi, replace(problem, data=data), None, seeded(1))
        return most[0]

    assert most_alive(80) == most_alive(20) < 20
