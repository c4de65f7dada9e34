"""Relations that hold between results, where no closed form exists."""

from dataclasses import replace

import pytest
import torch
from cases import F64, assert_same, image_learner, images, largest_difference, regression, regression_learner, seeded

from metalearn_utils.evaluate import evaluate
from metalearn_utils.meta import Learner, fomaml, joint, maml, reptile
from metalearn_utils.convnets import conv4
from metalearn_utils.models import params_of
from metalearn_utils.parallel import cross_entropy
from metalearn_utils.prototypes import Prototypes, prototypical
from metalearn_utils.rules import Params, per_parameter, sgd
from metalearn_utils.tasks.base import Batch, Tasks

ALGORITHMS = {"maml": maml, "fomaml": fomaml, "reptile": reptile, "joint": joint, "prototypical": prototypical}


def cases(name: str):
    """The learner, theta and tasks on which an algorithm is tried, in both kinds: regression and images."""
    images_of, theta = image_learner()
    if name == "prototypical":
        return [(Prototypes(images_of.model, temperature=1.0), theta, images(5, 3, 2, 2))]
    return [(*regression_learner(), regression(5, 4, 6)), (images_of, theta, images(5, 3, 2, 2))]


def rows(tasks: Tasks, index: list[int]) -> Tasks:
    return Tasks(*(Batch(b.x[index], b.y[index]) for b in tasks))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_order_of_tasks_changes_nothing(name: str) -> None:
    for learner, theta, tasks in cases(name):
        a, b = (ALGORITHMS[name](learner, theta, t) for t in (tasks, rows(tasks, [3, 1, 4, 0, 2])))
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-12)
        assert_same(a.theta, b.theta, 1e-11)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_duplicated_batch_of_tasks_changes_nothing(name: str) -> None:
    """mean(t, t) = mean(t): a sum would double."""
    for learner, theta, tasks in cases(name):
        a, b = (ALGORITHMS[name](learner, theta, t) for t in (tasks, rows(tasks, [*range(5), *range(5)])))
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-12)
        assert_same(a.theta, b.theta, 1e-11)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_duplicated_examples_change_nothing(name: str) -> None:
    """The loss is a mean over examples: every example twice gives the same gradient."""
    for learner, theta, tasks in cases(name):
        twice = Tasks(*(Batch(torch.cat([b.x, b.x], 1), torch.cat([b.y, b.y], 1)) for b in tasks))
        a, b = (ALGORITHMS[name](learner, theta, t) for t in (tasks, twice))
        assert_same(a.theta, b.theta, 1e-11)


def relabelled(tasks: Tasks, order: torch.Tensor) -> Tasks:
    return Tasks(*(Batch(b.x, order[b.y]) for b in tasks))


def with_head_rows(params: Params, order: torch.Tensor) -> Params:
    """Row order[i] of the head is the old row i."""
    inverse = order.argsort()
    return params | {k: params[k][inverse] for k in ("head.weight", "head.bias")}


@pytest.mark.parametrize("algorithm", [maml, fomaml, reptile, joint])
def test_permuting_labels_with_the_rows_of_the_head_permutes_the_gradient(algorithm) -> None:
    """L(P y, P head) = L(y, head), so the gradient is that of the old labels with the head's rows permuted."""
    (learner, theta), tasks, order = image_learner(), images(4, 3, 2, 2), torch.tensor([2, 0, 1])
    before = algorithm(learner, theta, tasks)
    after = algorithm(learner, with_head_rows(theta, order), relabelled(tasks, order))
    assert after.loss.item() == pytest.approx(before.loss.item(), rel=1e-12)
    assert_same(after.theta, with_head_rows(before.theta, order), 1e-11)


def test_permuting_labels_alone_changes_the_gradient() -> None:
    """With the head as it is, one label order is another task."""
    (learner, theta), tasks, order = image_learner(), images(4, 3, 2, 2), torch.tensor([2, 0, 1])
    other = maml(learner, theta, relabelled(tasks, order))
    assert largest_difference(other.theta, maml(learner, theta, tasks).theta) > 0.1


def test_prototypical_networks_do_not_care_about_the_names_of_classes() -> None:
    (learner, theta), tasks = (Prototypes(image_learner()[0].model), image_learner()[1]), images(4, 3, 2, 2)
    other = relabelled(tasks, torch.tensor([2, 0, 1]))
    assert_same(prototypical(learner, theta, other).theta, prototypical(learner, theta, tasks).theta, 1e-11)


@pytest.mark.parametrize("make", [regression_learner, image_learner])
def test_reptile_with_one_step_is_joint_training(make) -> None:
    """θ − θ_1 = α ∇ of the loss over support and query together"""
    learner, theta = make(sgd(0.3), 1)
    tasks = regression(4, 4, 6) if make is regression_learner else images(4, 3, 2, 2)
    expected = {k: 0.3 * v for k, v in joint(learner, theta, tasks).theta.items()}
    assert_same(reptile(learner, theta, tasks).theta, expected, 1e-12)


@pytest.mark.parametrize("make", [regression_learner, image_learner])
def test_meta_sgd_with_equal_rates_is_maml(make) -> None:
    """The same θ-gradient; the per-weight gradients add up to that of the one rate."""
    one = sgd(0.3)
    learner, theta = make(one, 2)
    many = sgd(per_parameter(0.3, theta))
    tasks = regression(4, 4, 6) if make is regression_learner else images(4, 3, 2, 2)
    a = maml(learner, theta, tasks, one.phi)
    b = maml(replace(learner, rule=many), theta, tasks, many.phi)
    assert_same(b.theta, a.theta, 1e-12)
    assert sum(v.sum() for v in b.phi["lr"].values()).item() == pytest.approx(a.phi["lr"].item(), rel=1e-10)


@pytest.mark.parametrize("change", [{"steps": 0}, {"rule": sgd(0.0)}])
@pytest.mark.parametrize("algorithm", [maml, fomaml])
def test_without_adaptation_the_gradient_is_that_of_joint_training(algorithm, change: dict) -> None:
    """K = 0 or α = 0, query = support: θ_K = θ and the Hessian term has factor α."""
    (learner, theta), tasks = image_learner(), images(4, 3, 2, 2)
    same = Tasks(tasks.query, tasks.query)
    query_only = replace(learner, **change)
    assert_same(algorithm(query_only, theta, tasks).theta, maml(replace(learner, steps=0), theta, tasks).theta, 1e-12)
    assert_same(algorithm(query_only, theta, Tasks(*same)).theta, joint(learner, theta, same).theta, 1e-10)


def test_reptile_without_steps_stays_where_it_is() -> None:
    learner, theta = regression_learner(steps=0)
    assert all((v == 0).all() for v in reptile(learner, theta, regression(4, 4, 6)).theta.values())


@pytest.mark.parametrize("algorithm", [maml, reptile])
def test_frozen_parameters_are_left_bitwise_alone(algorithm) -> None:
    """Adapted or averaged over 7 tasks, a frozen parameter is the same to the last bit."""
    learner, theta = regression_learner(adapt_only=("layers.2.",))
    tasks = regression(7, 4, 6)
    if algorithm is reptile:
        step = reptile(learner, theta, tasks).theta
        assert all((v == 0).all() for k, v in step.items() if not k.startswith("layers.2."))
        assert (step["layers.2.weight"] != 0).any()
    else:
        before = {k: v.clone() for k, v in theta.items()}
        maml(learner, theta, tasks)
        assert all(torch.equal(before[k], theta[k]) for k in theta)


def test_a_fresh_model_scores_one_in_n_before_adaptation() -> None:
    """Accuracy at step 0 is 100 / N within its 95 % interval over 600 tasks: no label leaks."""
    model = conv4(5, 4, "stride", generator=seeded(1))
    tasks = images(600, 5, 1, 1, seed=3).to(dtype=torch.float32)
    scores = evaluate(Learner(model, cross_entropy, sgd(0.4), 1), params_of(model), tasks)
    assert abs(scores.mean[0].item() - 20.0) < scores.interval[0].item()
    assert scores.interval[0].item() < 2.0
    assert scores.mean[1].item() > 22.0, "and adaptation helps"


def test_float32_and_float64_agree_to_float32_precision() -> None:
    """Device and dtype follow the inputs."""
    (learner, theta), tasks = image_learner(), images(4, 3, 2, 2)
    exact = maml(learner, theta, tasks).theta
    single = maml(learner, {k: v.float() for k, v in theta.items()}, tasks.to(dtype=torch.float32)).theta
    assert all(v.dtype == torch.float32 for v in single.values())
    assert_same({k: v.to(F64) for k, v in single.items()}, exact, 1e-4)
