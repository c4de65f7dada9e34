"""Meta-training a rule: resuming in the middle of a run, estimates that are not finite, clipping, what it computes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import F64, assert_same, seeded
from torch import Tensor
from torch.utils import _pytree as pytree
from training_cases import LEARNED, RULES, bowls, flat, net_problem

from metalearn_utils.checkpoints import CheckpointError, read_checkpoint
from metalearn_utils.episodes import Episodes, train_rule
from metalearn_utils.estimators import Carry, Estimate, es, pes, truncated, truncated_es, unrolled
from metalearn_utils.rules import UpdateRule, sgd
from metalearn_utils.runs import DivergedError, Trained
from metalearn_utils.tasks.problems import Problem, Quadratics

ITERATIONS = 10
SGD = partial(torch.optim.SGD)
ESTIMATORS: dict[str, Callable] = {
    "pes": pes(2, 8, 2, 0.05),
    "truncated": truncated(2, 8),
    "truncated, stop-gradient": truncated(2, 8, stop_gradient=True),
    "truncated es": truncated_es(2, 8, 2, 0.05),
    "es": es(3, 2, 0.05),
}


def sample(generator: torch.Generator) -> Problem:
    """Two small networks that depend on the generator alone, with other data at every step."""
    return net_problem(2, seed=int(torch.randint(1 << 30, (), generator=generator)))


def train(rule: UpdateRule, estimator: Callable, iterations: int = ITERATIONS, draw=sample, **options) -> Trained:
    return train_rule(rule, draw, estimator, iterations, **({"progress": False, "seed": 3, "every": 5} | options))


def assert_identical(a: Trained, b: Trained) -> None:
    """Equal to the last bit."""
    assert a.losses == b.losses
    assert a.skipped == b.skipped
    assert all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a.theta), pytree.tree_leaves(b.theta)))


# Resuming.


def check_resumed(name: str, kind: str, stop: int, path: Path) -> None:
    """Windows are a quarter of a run: after `stop` iterations the run stands in its middle, or at its end."""
    rule, estimator = RULES[name](), ESTIMATORS[kind]
    whole = train(rule, estimator)
    first = train(rule, estimator, checkpoint=path, stop=stop)
    assert not first.finished
    assert first.losses == whole.losses[:stop]
    second = train(rule, estimator, checkpoint=path)
    assert second.finished
    assert_identical(second, whole)


@pytest.mark.parametrize("stop", [6, 8])
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_interrupted_in_a_run_and_resumed_equals_uninterrupted(kind: str, stop: int, tmp_path: Path) -> None:
    check_resumed("step size and momentum", kind, stop, tmp_path / "run.pt")


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"step size and momentum", "rates per layer and step"}))
def test_the_state_of_every_rule_survives_a_checkpoint(name: str, tmp_path: Path) -> None:
    """None, numbers, tensors, lists and dicts of tensors are read back with `weights_only`."""
    check_resumed(name, "pes", 6, tmp_path / "run.pt")


def test_a_checkpoint_holds_where_the_run_stands(tmp_path: Path) -> None:
    """After 6 windows of 2 steps out of 8: step 4 of the second run; at a run's end nothing."""
    path = tmp_path / "run.pt"
    train(RULES["LSTM"](), ESTIMATORS["pes"], checkpoint=path, stop=6)
    standing = read_checkpoint(path)["standing"]
    assert Carry(*standing["carry"]).step == 4
    assert standing["drawn"] is not None
    train(RULES["LSTM"](), ESTIMATORS["pes"], checkpoint=path, stop=8)
    assert read_checkpoint(path)["standing"] == {"drawn": None, "carry": None}


def forgetting(part: str) -> Callable:
    """`Episodes.restore`, but one part is not restored."""
    right = Episodes.restore

    def restore(self: Episodes, saved: dict) -> None:
        if part == "everything":
            return
        step, params, state, noise = saved["carry"]
        if part == "noise":
            noise = pytree.tree_map(torch.zeros_like, noise)
        if part == "rule's state":
            state = self.rule.init(params) | {"loss": state["loss"]}
        if part == "problem":
            saved = saved | {"drawn": seeded(99).get_state()}
        right(self, saved | {"carry": None if part == "carry" else (step, params, state, noise)})

    return restore


PARTS = [("pes", part) for part in ("everything", "carry", "noise", "rule's state", "problem")]


@pytest.mark.parametrize(("kind", "part"), [*PARTS, *(("truncated", p) for p in ("everything", "carry", "problem"))])
def test_resuming_without_one_part_of_a_run_would_be_noticed(kind: str, part: str, monkeypatch, tmp_path: Path) -> None:
    """A planted bug: each part of where a run stands is needed for equality to the last bit."""
    monkeypatch.setattr(Episodes, "restore", forgetting(part))
    with pytest.raises(AssertionError):
        check_resumed("step size and momentum", kind, 6, tmp_path / "run.pt")


def test_a_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(sgd(0.2), ESTIMATORS["truncated"], checkpoint=path, stop=3)
    with pytest.raises(CheckpointError, match="run.pt belongs to another run"):
        train(sgd(0.3), ESTIMATORS["truncated"], checkpoint=path)


# Which problems are drawn.


def counted(drawn: list[Problem], change: Callable[[int, Problem], Problem] = lambda n, problem: problem) -> Callable:
    """`sample`, noting every problem, and changing the n-th."""

    def draw(generator: torch.Generator) -> Problem:
        drawn.append(change(len(drawn), sample(generator)))
        return drawn[-1]

    return draw


@pytest.mark.parametrize(("kind", "runs"), [("truncated", 3), ("pes", 3), ("es", 10)])
def test_a_problem_is_drawn_for_every_run_and_not_for_every_window(kind: str, runs: int) -> None:
    """10 windows are 2 1/2 runs of 4 windows, or 10 runs of one."""
    drawn: list[Problem] = []
    train(RULES["step size"](), ESTIMATORS[kind], draw=counted(drawn))
    assert len(drawn) == runs
    assert not torch.equal(drawn[0].theta["w"], drawn[1].theta["w"])


def test_windows_of_a_run_go_on_where_the_last_one_ended() -> None:
    """With an outer step of zero, the losses are those of the estimator's own windows."""
    rule, generator, expected = RULES["LSTM"](), seeded(3), []
    for _ in range(2):
        problem, carry = sample(generator), None
        for _ in range(4):
            found = ESTIMATORS["pes"](rule, rule.phi, problem, carry, generator)
            expected.append(found.loss.item())
            carry = found.carry
    assert train(rule, ESTIMATORS["pes"], 8, lr=0.0).losses == pytest.approx(expected, rel=1e-12)


# What a step does.


def first_estimate(rule: UpdateRule, estimator: Callable) -> Estimate:
    generator = seeded(3)
    return estimator(rule, rule.phi, sample(generator), None, generator)


@pytest.mark.parametrize("name", ["step size", "Meta-SGD"])
@pytest.mark.parametrize("kind", ["pes", "truncated"])
def test_one_step_of_sgd_is_phi_minus_lr_times_the_estimate(kind: str, name: str) -> None:
    """φ - η ĝ with the first problem and the first perturbations that the seed gives; `theta` of the result is φ."""
    rule = RULES[name]()
    expected = flat(first_estimate(rule, ESTIMATORS[kind]).phi)
    found = train(rule, ESTIMATORS[kind], 1, optimizer=SGD, lr=0.3, clip=None)
    assert_same(flat(found.theta), {k: v - 0.3 * expected[k] for k, v in flat(rule.phi).items()}, 1e-13)
    assert found.phi is None
    assert rule._replace(phi=found.theta).phi.keys() == rule.phi.keys()


def change_of(rule: UpdateRule, clip: float | None) -> Tensor:
    """Length and direction of one step of SGD with η = 1."""
    found = train(rule, ESTIMATORS["truncated"], 1, optimizer=SGD, lr=1.0, clip=clip).theta
    return torch.cat([(found[k] - v).flatten() for k, v in rule.phi.items()])


def test_clipping_bounds_the_gradient_and_keeps_its_direction() -> None:
    """|g| -> min(|g|, clip), over all tensors of φ together"""
    rule = RULES["step size"]()
    free = change_of(rule, None)
    assert free.norm() > 0.05
    short = change_of(rule, 0.05)
    assert short.norm().item() == pytest.approx(0.05, rel=1e-4)
    assert torch.allclose(short / short.norm(), free / free.norm(), rtol=1e-9)
    assert torch.allclose(change_of(rule, 1e6), free, rtol=1e-12)


def test_a_gradient_is_clipped_to_length_one_unless_asked_otherwise() -> None:
    steep = lambda *args: Estimate(torch.zeros(()), {"lr": torch.tensor(50.0, dtype=F64)}, None)  # noqa: E731
    found = train(sgd(0.2), steep, 1, optimizer=SGD, lr=0.01)
    assert found.theta["lr"].item() == pytest.approx(0.2 - 0.01, rel=1e-6)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_a_clip_that_is_not_positive_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match=f"clip must be a number > 0 or None, got {clip}"):
        train(sgd(0.2), ESTIMATORS["truncated"], clip=clip)


def test_meta_training_finds_the_rate_that_solves_a_parabola() -> None:
    """f = ½ h x² with h = 2 is solved in one step of rate 1 / h."""
    problem = bowls([[2.0]])
    found = train(sgd(0.1), unrolled(1), 60, draw=lambda g: problem, optimizer=SGD, lr=0.1, clip=None)
    assert found.theta["lr"].item() == pytest.approx(0.5, abs=1e-6)
    assert found.losses[-1] < 1e-10 * found.losses[0]


@pytest.mark.parametrize("kind", ["pes", "truncated"])
def test_meta_training_lowers_the_loss_of_problems_that_were_not_seen(kind: str) -> None:
    family, rule = Quadratics(4, 10.0), LEARNED["step size"]()
    draw = lambda g: family.sample(8, generator=g)  # noqa: E731
    found = train(rule, {"pes": pes(5, 10, 4, 0.05), "truncated": truncated(5, 10)}[kind], 60, draw, lr=0.02)
    test = family.sample(50, generator=seeded(77))
    loss = lambda phi: unrolled(10)(rule, phi, test, None, seeded()).loss.item()  # noqa: E731
    assert loss(found.theta) < 0.9 * loss(rule.phi)
    assert found.skipped == []


# Estimates that are not finite.


def spoilt_from(step: int, at: int) -> Callable[[int, Problem], Problem]:
    """The at-th problem has data that are not finite from this step on."""

    def change(n: int, problem: Problem) -> Problem:
        if n != at:
            return problem
        return replace(problem, data=lambda t: tuple(v * (float("nan") if t >= step else 1.0) for v in problem.data(t)))

    return change


def check_skipped(kind: str) -> None:
    """Problem 1 (windows 5 to 8) breaks in its second window: iteration 6 is skipped, 7 begins problem 2."""
    drawn: list[Problem] = []
    found = train(RULES["step size"](), ESTIMATORS[kind], draw=counted(drawn, spoilt_from(4, 1)))
    assert found.skipped == [6]
    assert [i + 1 for i, v in enumerate(found.losses) if v != v] == [6]
    assert len(drawn) == 2 + (ITERATIONS - 6) // 4
    assert found.finished
    assert all(v.isfinite().all() for v in found.theta.values())


@pytest.mark.parametrize("kind", ["pes", "truncated", "truncated es"])
def test_an_estimate_that_is_not_finite_is_skipped_and_counted_and_the_run_ends(kind: str) -> None:
    check_skipped(kind)


def test_a_skipped_estimate_changes_nothing() -> None:
    """φ after iterations 5 and 6 is the same; so are the moments of Adam, since 7 and later go on as without it."""
    draw = lambda: counted([], spoilt_from(4, 1))  # noqa: E731
    after = [train(RULES["step size"](), ESTIMATORS["truncated"], draw=draw(), stop=stop).theta for stop in (5, 6, 7)]
    assert all(torch.equal(after[0][k], after[1][k]) for k in after[0])
    assert not torch.equal(after[1]["b2"], after[2]["b2"])


def test_a_gradient_that_is_not_finite_is_skipped_though_its_loss_is() -> None:
    """A root at zero: finite loss, infinite derivative."""
    count = iter(range(10))

    def estimator(*args) -> Estimate:
        broken = float("inf") if next(count) == 2 else 1.0
        return Estimate(torch.ones(()), {"lr": torch.tensor(broken, dtype=F64)}, None)

    found = train(sgd(0.2), estimator, 5, optimizer=SGD, lr=0.01, clip=None)
    assert found.skipped == [3]
    assert found.theta["lr"].item() == pytest.approx(0.2 - 4 * 0.01, rel=1e-12)


def test_skipped_iterations_survive_a_checkpoint(tmp_path: Path) -> None:
    path, draw = tmp_path / "run.pt", lambda: counted([], spoilt_from(4, 1))
    whole = train(RULES["step size"](), ESTIMATORS["truncated"], draw=draw())
    train(RULES["step size"](), ESTIMATORS["truncated"], draw=draw(), checkpoint=path, stop=9)
    resumed = train(RULES["step size"](), ESTIMATORS["truncated"], checkpoint=path)
    assert resumed.skipped == whole.skipped == [6]
    assert [v for v in resumed.losses if v == v] == [v for v in whole.losses if v == v]


def test_without_skipping_the_run_stops() -> None:
    with pytest.raises(DivergedError, match="not finite at iteration 6 "):
        train(RULES["step size"](), ESTIMATORS["truncated"], draw=counted([], spoilt_from(4, 1)), skip=False)


def test_a_run_that_goes_on_after_it_broke_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: the broken problem is begun again, and breaks again."""
    right = Episodes.estimate

    def stubborn(self: Episodes, *args):
        before = self.problem
        found = right(self, *args)
        if not found.loss.isfinite():
            self.problem = before
        return found

    monkeypatch.setattr(Episodes, "estimate", stubborn)
    with pytest.raises(AssertionError):
        check_skipped("truncated")
