"""What the outer objectives accept, refuse and leave alone. Their gradients: tests/oracles and tests/peers."""

from dataclasses import replace

import pytest
import torch
from cases import F64, assert_same, image_learner, images, regression, regression_learner, tanh_net
from torch import nn

from metalearn_utils.evaluate import evaluate
from metalearn_utils.meta import Learner, fomaml, joint, maml, reptile, supervised
from metalearn_utils.models import params_of
from metalearn_utils.parallel import cross_entropy, mse
from metalearn_utils.prototypes import NearestNeighbour, Prototypes, prototypical
from metalearn_utils.rules import sgd
from metalearn_utils.tasks.base import Batch, Tasks

GRADIENTS = [maml, fomaml, reptile, joint]
EVERYTHING = [*GRADIENTS, evaluate]


def changed(tasks: Tasks, part: str, **parts: torch.Tensor) -> Tasks:
    return tasks._replace(**{part: getattr(tasks, part)._replace(**parts)})


@pytest.mark.parametrize("algorithm", GRADIENTS)
def test_results_are_detached_and_have_the_shapes_of_theta(algorithm) -> None:
    learner, theta = regression_learner()
    found = algorithm(learner, theta, regression(4, 5, 6))
    assert found.loss.shape == ()
    assert not found.loss.requires_grad
    assert {k: v.shape for k, v in found.theta.items()} == {k: v.shape for k, v in theta.items()}
    assert not any(v.requires_grad for v in found.theta.values())
    assert found.phi is None


@pytest.mark.parametrize("algorithm", EVERYTHING)
def test_inputs_and_model_are_left_alone(algorithm) -> None:
    (learner, theta), tasks = image_learner(), images(4, 3, 2, 2)
    kept = [v.clone() for v in (*theta.values(), *learner.model.parameters(), *tasks.support, *tasks.query)]
    algorithm(learner, theta, tasks)
    after = [*theta.values(), *learner.model.parameters(), *tasks.support, *tasks.query]
    assert all(torch.equal(a, b) for a, b in zip(kept, after))
    assert not any(v.requires_grad for v in theta.values())


def test_phi_is_used_when_it_is_passed() -> None:
    """maml(..., phi) equals maml with the rule built from phi."""
    (learner, theta), tasks = regression_learner(sgd(0.1)), regression(4, 5, 6)
    other = {"lr": torch.tensor(0.3, dtype=F64)}
    expected = maml(replace(learner, rule=sgd(0.3)), theta, tasks).theta
    assert_same(maml(learner, theta, tasks, other).theta, expected, 1e-14)


def test_reptile_takes_minibatches_in_order_and_around() -> None:
    """5 support and 3 query examples in batches of 3: rows 0-2, 3-5, 6, 7, 0."""
    (learner, theta), tasks = regression_learner(sgd(0.2), 3), regression(1, 5, 3)
    x, y = (torch.cat(pair, 1)[0] for pair in zip(tasks.support, tasks.query))
    params = theta
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7, 0]):
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        loss = mse(torch.func.functional_call(learner.model, leaves, (x[rows],)), y[rows])
        grads = torch.autograd.grad(loss, list(leaves.values()))
        params = {k: v - 0.2 * g for (k, v), g in zip(params.items(), grads)}
    found = reptile(learner, theta, tasks, batch_size=3).theta
    assert_same(found, {k: theta[k] - params[k] for k in theta}, 1e-13)


@pytest.mark.parametrize("steps", [1, 4])
def test_predict_gives_the_queries_outputs_after_every_step(steps: int) -> None:
    (learner, theta), tasks = image_learner(), images(5, 3, 1, 2)
    found = learner.predict(theta, tasks, steps=steps)
    assert found.shape == (steps + 1, 5, 6, 3)
    assert not found.requires_grad
    fewer = learner.predict(theta, tasks, steps=0)
    assert torch.equal(found[:1], fewer)


# Bad input: the message names the argument, what was expected and what came.

REGRESSION = regression(4, 5, 6)
IMAGES = images(4, 3, 2, 2)
EMPTY = REGRESSION.support.x[:, :0], REGRESSION.support.y[:, :0]


def poisoned(value: float) -> torch.Tensor:
    x = REGRESSION.support.x.clone()
    x[1, 2] = value
    return x


BAD_TASKS = {
    "no support examples": (
        changed(REGRESSION, "support", x=EMPTY[0], y=EMPTY[1]),
        r"tasks.support.x must have shape \[tasks >= 1, examples >= 1, ...\], got \(4, 0, 1\)",
    ),
    "no query examples": (
        changed(REGRESSION, "query", x=EMPTY[0], y=EMPTY[1]),
        r"tasks.query.x must have shape \[tasks >= 1, examples >= 1, ...\], got \(4, 0, 1\)",
    ),
    "no tasks": (Tasks(*(Batch(b.x[:0], b.y[:0]) for b in REGRESSION)), r"tasks.support.x must .* got \(0, 5, 1\)"),
    "no task axis": (changed(REGRESSION, "query", y=torch.zeros(6)), r"tasks.query.y must have shape .* got \(6,\)"),
    "NaN": (changed(REGRESSION, "support", x=poisoned(float("nan"))), "tasks.support.x must be finite, got NaN"),
    "infinity": (changed(REGRESSION, "support", x=poisoned(float("inf"))), "tasks.support.x must be finite"),
    "more x than y": (
        changed(REGRESSION, "query", y=REGRESSION.query.y[:, :4]),
        "tasks.query: x has 6 examples per task, y has 4",
    ),
    "more query tasks": (
        changed(REGRESSION, "query", x=REGRESSION.query.x[:3], y=REGRESSION.query.y[:3]),
        r"support and query must hold the same number of tasks, got \[3, 4\]",
    ),
    "query examples of another shape": (
        changed(REGRESSION, "query", x=REGRESSION.query.x.expand(-1, -1, 2)),
        r"tasks.query.x must have examples of shape \(1,\), as tasks.support.x, got \(2,\)",
    ),
    "examples that the model cannot take": (
        Tasks(*(b._replace(x=b.x.expand(-1, -1, 7)) for b in REGRESSION)),
        r"tasks: the model takes no examples of shape \(5, 7\) per task",
    ),
    "targets without the axis of outputs": (
        Tasks(*(b._replace(y=b.y[..., 0]) for b in REGRESSION)),
        r"tasks.support.y must have examples of shape \(1,\), as the outputs, got \(\)",
    ),
}


@pytest.mark.parametrize("fault", BAD_TASKS)
@pytest.mark.parametrize("algorithm", EVERYTHING)
def test_malformed_tasks_are_refused(algorithm, fault: str) -> None:
    (learner, theta), (tasks, message) = regression_learner(), BAD_TASKS[fault]
    with pytest.raises(ValueError, match=message):
        algorithm(learner, theta, tasks)


BAD_LABELS = {
    "too high": (IMAGES.query.y + 1, "tasks.query.y must hold labels from 0 to 2, got labels from 1 to 3"),
    "negative": (IMAGES.query.y - 1, "tasks.query.y must hold labels from 0 to 2, got labels from -1 to 1"),
    "not integers": (IMAGES.query.y.double(), "tasks.query.y must hold class labels of dtype int64, got torch.float64"),
}


@pytest.mark.parametrize("fault", BAD_LABELS)
@pytest.mark.parametrize("kind", ["loop", "vmap"])
@pytest.mark.parametrize("algorithm", EVERYTHING)
def test_labels_that_the_model_has_no_output_for_are_refused(algorithm, kind: str, fault: str, force) -> None:
    force(kind)
    (learner, theta), (y, message) = image_learner(), BAD_LABELS[fault]
    with pytest.raises(ValueError, match=message):
        algorithm(learner, theta, changed(IMAGES, "query", y=y))


@pytest.mark.parametrize("fault", BAD_LABELS)
@pytest.mark.parametrize("learner", [Prototypes, NearestNeighbour])
def test_labels_without_a_support_class_are_refused(learner, fault: str) -> None:
    (images_of, theta), (y, message) = image_learner(), BAD_LABELS[fault]
    with pytest.raises(ValueError, match=message):
        evaluate(learner(images_of.model), theta, changed(IMAGES, "query", y=y))


@pytest.mark.parametrize("algorithm", [evaluate, prototypical])
def test_a_class_without_support_examples_is_named(algorithm) -> None:
    model, theta = image_learner()[0].model, image_learner()[1]
    y = IMAGES.support.y.clone()
    y[2] = y[2].clamp(max=1)
    with pytest.raises(ValueError, match="tasks.support.y must hold every label from 0 to 2, but task 2 lacks 2"):
        algorithm(Prototypes(model), theta, changed(IMAGES, "support", y=y))


def test_labels_of_supervised_training_are_checked() -> None:
    (learner, theta), batch = image_learner(), Batch(IMAGES.support.x[0], IMAGES.support.y[0] + 5)
    with pytest.raises(ValueError, match="batch.y must hold labels from 0 to 2, got labels from 5 to 7"):
        supervised(learner, theta, batch)
    with pytest.raises(ValueError, match="batch.x must be finite, got NaN"):
        supervised(learner, theta, Batch(batch.x * float("nan"), batch.y))


def bad_thetas():
    theta = tanh_net()[1]
    misspelt = {k.replace("0.weight", "0.wieght"): v for k, v in theta.items()}
    shaped = theta | {"layers.1.bias": torch.zeros(7, dtype=F64)}
    return {
        "misspelt": (misspelt, r"theta: parameter 'layers.0.w\w+ght' is (unknown to the model|missing); the model has"),
        "missing": ({k: theta[k] for k in list(theta)[1:]}, "theta: parameter 'layers.0.weight' is missing"),
        "surplus": (theta | {"spare": torch.ones(1)}, "theta: parameter 'spare' is unknown to the model"),
        "shape": (shaped, r"theta\['layers.1.bias'\] must have shape \(4,\), got \(7,\)"),
        "dtype": (
            {k: v.float() for k, v in theta.items()},
            r"theta\['layers.0.weight'\] must have dtype torch.float64, as the examples, got torch.float32",
        ),
    }


@pytest.mark.parametrize("fault", bad_thetas())
@pytest.mark.parametrize("algorithm", EVERYTHING)
def test_parameters_that_do_not_fit_the_model_are_named(algorithm, fault: str) -> None:
    theta, message = bad_thetas()[fault]
    with pytest.raises(ValueError, match=message):
        algorithm(regression_learner()[0], theta, REGRESSION)


@pytest.mark.parametrize("algorithm", [supervised, prototypical])
def test_parameters_are_checked_without_an_inner_loop_too(algorithm) -> None:
    (learner, theta), batch = image_learner(), Batch(IMAGES.support.x[0], IMAGES.support.y[0])
    learner, data = (learner, batch) if algorithm is supervised else (Prototypes(learner.model), IMAGES)
    with pytest.raises(ValueError, match="theta: parameter 'spare' is unknown to the model"):
        algorithm(learner, theta | {"spare": torch.ones(1)}, data)


class Unused(nn.Linear):
    """A linear map with a parameter that it never uses."""

    def __init__(self) -> None:
        super().__init__(1, 1, dtype=F64)
        self.spare = nn.Parameter(torch.ones(2, dtype=F64))


@pytest.mark.parametrize("algorithm", EVERYTHING)
def test_a_parameter_that_the_loss_does_not_use_is_named(algorithm) -> None:
    model = Unused()
    with pytest.raises(ValueError, match="theta holds 'spare', but the loss does not use it"):
        algorithm(Learner(model, mse, sgd(0.1), 1), params_of(model), REGRESSION)


@pytest.mark.parametrize("algorithm", [maml, fomaml, reptile, evaluate])
@pytest.mark.parametrize("steps", [-1, 2.0])
def test_bad_steps_are_refused(algorithm, steps) -> None:
    learner, theta = regression_learner(steps=steps)
    with pytest.raises(ValueError, match=f"steps must be an integer >= 0, got {steps}"):
        algorithm(learner, theta, REGRESSION)


@pytest.mark.parametrize("algorithm", [maml, fomaml, reptile, evaluate])
def test_a_misspelt_layer_to_adapt_is_refused(algorithm) -> None:
    learner, theta = regression_learner(adapt_only=("head.",))
    with pytest.raises(ValueError, match=r"only names 'head.', but the parameters are \['layers.0.bias'"):
        algorithm(learner, theta, REGRESSION)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("algorithm", [maml, fomaml, joint])
@pytest.mark.parametrize("kind", ["batched", "vmap", "loop"])
def test_a_loss_that_is_no_mean_is_refused(algorithm, kind: str, steps: int, force) -> None:
    """One value per example would be summed in silence: the step size would depend on their number."""
    force(kind)
    learner, theta = regression_learner(steps=steps)
    per_example = replace(learner, loss=lambda outputs, y: ((outputs - y) ** 2).flatten(1).mean(1))
    with pytest.raises(ValueError, match="loss must return one number per task, the mean over examples; got"):
        algorithm(per_example, theta, REGRESSION)


@pytest.mark.parametrize(("settings", "message"), [
    ({"reduction": "max"}, "reduction must be 'mean' or 'sum', got 'max'"),
    ({"batch_size": 0}, "batch_size must lie between 1 and the 11 examples of a task, got 0"),
    ({"batch_size": 12}, "batch_size must lie between 1 and the 11 examples of a task, got 12"),
])
def test_bad_settings_of_reptile_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reptile(*regression_learner(), REGRESSION, **settings)


def test_a_model_that_returns_one_number_for_all_examples_is_refused() -> None:
    class Mean(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mean()

    model = Mean(1, 1, dtype=F64)
    with pytest.raises(ValueError, match=r"model must return one row for each of the 5 examples of a task, got \(\)"):
        maml(Learner(model, mse, sgd(0.1), 1), params_of(model), REGRESSION)


def test_cross_entropy_of_one_task_is_a_mean() -> None:
    logits, y = torch.randn(7, 3, dtype=F64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    expected = -logits.log_softmax(1)[range(7), y].mean()
    assert cross_entropy(logits, y).item() == pytest.approx(expected.item(), rel=1e-14)
