"""The meta-gradients of learn2learn (Arnold et al. 2020) on the same model and data."""

from copy import deepcopy

import pytest
import torch
from cases import assert_same, images, jittered, largest_difference, regression, small_conv, tanh_net
from torch import nn

from metalearn_utils.meta import Learner, fomaml, maml
from metalearn_utils.parallel import cross_entropy, mse
from metalearn_utils.rules import Params, per_parameter, sgd
from metalearn_utils.tasks.base import Tasks

l2l = pytest.importorskip("learn2learn", reason="learn2learn")

ALPHA, STEPS = 0.2, 3


def with_parameters(model: nn.Module, theta: Params) -> nn.Module:
    """A copy of the model that holds theta."""
    copy = deepcopy(model).double()
    copy.load_state_dict(theta)
    return copy


def peer(wrapped: nn.Module, learner: Learner, tasks: Tasks) -> float:
    """learn2learn's loop: clone, adapt, query loss, mean over tasks, backward; leaves the gradients on `wrapped`."""
    total = 0.0
    for xs, ys, xq, yq in zip(*tasks.support, *tasks.query):
        clone = wrapped.clone()
        for _ in range(learner.steps):
            clone.adapt(learner.loss(clone(xs), ys))
        total = total + learner.loss(clone(xq), yq) / len(tasks.support.x)
    total.backward()
    return total.item()


def grads(parameters) -> list[torch.Tensor]:
    return [p.grad for p in parameters]


CASES = {
    "MLP": lambda: (*tanh_net(), mse, regression(5, 6, 7)),
    "conv4 with max pooling": lambda: (*small_conv(3, 4), cross_entropy, images(4, 3, 1, 2)),
    "conv4 with strides": lambda: (*small_conv(3, 4, pool="stride"), cross_entropy, images(4, 3, 1, 2)),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_maml_and_fomaml_equal_learn2learn(case: str, first_order: bool) -> None:
    model, theta, loss, tasks = CASES[case]()
    learner = Learner(model, loss, sgd(ALPHA), STEPS)
    wrapped = l2l.algorithms.MAML(with_parameters(model, theta), lr=ALPHA, first_order=first_order)
    value = peer(wrapped, learner, tasks)
    found = (fomaml if first_order else maml)(learner, theta, tasks)
    assert found.loss.item() == pytest.approx(value, rel=1e-9)
    assert_same(found.theta, dict(zip(theta, grads(wrapped.parameters()))), 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_meta_sgd_equals_learn2learn(case: str) -> None:
    """θ and the rates α, all different, both to 1e-6"""
    model, theta, loss, tasks = CASES[case]()
    rates = {k: v.abs() for k, v in jittered(per_parameter(0.1, theta)).items()}
    rule = sgd(rates)
    wrapped = l2l.algorithms.MetaSGD(with_parameters(model, theta), lr=0.1)
    for rate, value in zip(wrapped.lrs, rates.values()):
        rate.data = value.clone()
    learner = Learner(model, loss, rule, STEPS)
    peer(wrapped, learner, tasks)
    found = maml(learner, theta, tasks, rule.phi)
    assert_same(found.theta, dict(zip(theta, grads(wrapped.module.parameters()))), 1e-6)
    assert_same(found.phi["lr"], dict(zip(theta, grads(wrapped.lrs))), 1e-6)


def test_first_and_second_order_are_far_apart_here() -> None:
    """So that agreement to 1e-6 means something."""
    model, theta, loss, tasks = CASES["conv4 with max pooling"]()
    learner = Learner(model, loss, sgd(ALPHA), STEPS)
    assert largest_difference(fomaml(learner, theta, tasks).theta, maml(learner, theta, tasks).theta) > 0.01
