"""Central differences (h = 1e-5, float64) of the meta-loss against the meta-gradient, in theta and in phi."""

from collections.abc import Callable

import pytest
import torch
from cases import F64, assert_slopes, gradients_of, image_learner, images, jittered, regression, regression_learner

from metalearn_utils.meta import Learner, joint, maml, supervised
from metalearn_utils.prototypes import Prototypes, prototypical
from metalearn_utils.rules import Params, UpdateRule, adam, momentum, per_parameter, per_step, rmsprop, sgd

STEPS = 3


def rates(theta: Params) -> Params:
    """One rate per weight, all different."""
    return {k: v.abs() for k, v in jittered(per_parameter(0.1, theta)).items()}


# eps = 0.1 keeps the first step of Adam and RMSprop smooth: with a tiny eps it is the sign of the gradient.
RULES: dict[str, Callable[[Params], UpdateRule]] = {
    "sgd": lambda theta: sgd(0.2),
    "Meta-SGD": lambda theta: sgd(rates(theta)),
    "one rate per step": lambda theta: sgd(torch.tensor([0.3, 0.1, 0.2], dtype=F64)),
    "momentum": lambda theta: momentum(0.1, 0.8),
    "Nesterov momentum": lambda theta: momentum(0.1, 0.8, nesterov=True),
    "RMSprop": lambda theta: rmsprop(0.05, 0.9, eps=0.1),
    "Adam": lambda theta: adam(0.05, 0.8, 0.9, eps=0.1),
    "Adam with one rate per weight": lambda theta: adam(rates(theta), 0.8, 0.9, eps=0.1),
    "momentum with one rate per step": lambda theta: momentum(per_step(0.1, STEPS), 0.8),
}


def check(learner: Learner, theta: Params, tasks) -> None:
    """theta and phi of `maml` against differences of its loss."""
    d_theta, d_phi = gradients_of(maml(learner, theta, tasks, learner.rule.phi))
    assert_slopes(lambda at: maml(learner, at, tasks).loss.item(), theta, d_theta)
    flat = gradients_of(maml(learner, theta, tasks)._replace(phi=learner.rule.phi))[1]

    def loss(at: Params) -> float:
        phi = {k: {n: at[f"{k}.{n}"] for n in v} if isinstance(v, dict) else at[k] for k, v in learner.rule.phi.items()}
        return maml(learner, theta, tasks, phi).loss.item()

    assert_slopes(loss, flat, d_phi)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_a_tanh_network(rule: str, every_path: str) -> None:
    """d/dε mean L_Q(θ_K(θ + ε v, φ)) and d/dε mean L_Q(θ_K(θ, φ + ε v))"""
    learner, theta = regression_learner(steps=STEPS)
    learner = Learner(learner.model, learner.loss, RULES[rule](theta), STEPS)
    check(learner, theta, regression(4, 5, 6))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_a_smooth_conv4(rule: str) -> None:
    """The same on images with normalisation and cross-entropy."""
    learner, theta = image_learner()
    learner = Learner(learner.model, learner.loss, RULES[rule](theta), 2)
    check(learner, theta, images(2, 3, 1, 1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("transductive", [False, True])
@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_both_modes_of_normalisation_on_a_smooth_conv4(kind: str, transductive: bool, recompute: bool, force) -> None:
    """Second order through the batch's statistics, and through the support set's statistics."""
    force(kind)
    learner, theta = image_learner(sgd(0.3), 2, transductive=transductive, recompute=recompute)
    check(learner, theta, images(2, 3, 1, 2))


@pytest.mark.parametrize("only", [("head.",), ("convs.0.weight", "norms.")])
def test_adapting_some_layers_only(only: tuple[str, ...]) -> None:
    """ANIL and its relatives: the frozen layers keep their path through the adapted ones."""
    learner, theta = image_learner(sgd(0.3), 2, adapt_only=only)
    check(learner, theta, images(2, 3, 1, 2))


@pytest.mark.parametrize("transductive", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_prototypical_networks(metric: str, transductive: bool) -> None:
    """d/dε of the mean cross-entropy of softmax(−distance to the class means / temperature)"""
    model, theta = image_learner()[0].model, image_learner()[1]
    learner, tasks = Prototypes(model, metric, 0.7, transductive), images(2, 3, 2, 2)
    found = prototypical(learner, theta, tasks)
    assert_slopes(lambda at: prototypical(learner, at, tasks).loss.item(), theta, found.theta)


def test_joint_training() -> None:
    """d/dε of the mean loss over all examples of all tasks"""
    (learner, theta), tasks = image_learner(), images(2, 3, 1, 2)
    assert_slopes(lambda at: joint(learner, at, tasks).loss.item(), theta, joint(learner, theta, tasks).theta)


def test_supervised_training() -> None:
    """d/dε of the loss on one batch"""
    (learner, theta), tasks = image_learner(), images(1, 3, 2, 2)
    batch = type(tasks.support)(tasks.support.x[0], tasks.support.y[0])
    assert_slopes(lambda at: supervised(learner, at, batch).loss.item(), theta, supervised(learner, theta, batch).theta)
