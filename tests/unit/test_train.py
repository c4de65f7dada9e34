"""Meta-training: interrupts, checkpoints, resuming bit for bit, divergence, validation, and what it refuses."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import F64, image_learner, images, largest_difference, regression, regression_learner, seeded

from metalearn_utils import checkpoints, runs, train
from metalearn_utils.meta import fomaml, joint, maml, reptile, supervised
from metalearn_utils.prototypes import Prototypes, prototypical
from metalearn_utils.rules import sgd
from metalearn_utils.tasks.base import Batch
from metalearn_utils.checkpoints import CheckpointError
from metalearn_utils.train import DivergedError, meta_train

ITERATIONS = 14


def sample(generator: torch.Generator):
    """A batch of tasks that depends on the generator alone."""
    return regression(4, 5, 6, seed=int(torch.randint(1 << 30, (), generator=generator)))


def sampling(at: int, event):
    """`sample`, but at the given draw something happens first."""
    count = iter(range(1, 10_000))

    def draw(generator: torch.Generator):
        if next(count) == at:
            event()
        return sample(generator)

    return draw


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


LEARNER, THETA = regression_learner(sgd(0.1), 2)
SETTINGS = {
    "Adam": {},
    "Adam, learned rate, schedule": {"learn_rule": True, "schedule": lambda progress: 1 - progress, "lr": 0.05},
    "SGD with momentum": {"optimizer": partial(torch.optim.SGD, momentum=0.9), "lr": 0.02},
    "validated": {"validate": lambda theta, phi: -theta["layers.0.weight"].abs().sum().item(), "every": 3},
}


def run(draw=sample, iterations: int = ITERATIONS, algorithm=maml, **settings) -> train.Trained:
    settings = {"theta": THETA, "every": 5, "progress": False, "seed": 3} | settings
    return meta_train(algorithm, LEARNER, draw, iterations, **settings)


def assert_identical(a: train.Trained, b: train.Trained) -> None:
    """Equal to the last bit."""
    assert a.losses == b.losses
    assert a.validation == b.validation
    assert all(torch.equal(a.theta[k], b.theta[k]) for k in a.theta)
    assert (a.phi is None) == (b.phi is None)
    if a.phi is not None:
        assert all(torch.equal(a.phi[k], b.phi[k]) for k in a.phi)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("stop", [1, 7, 10])
def test_interrupted_and_resumed_equals_uninterrupted(stop: int, settings: str, tmp_path: Path) -> None:
    """Ctrl-C ends the run after the iteration at hand; the same call continues it."""
    path, options = tmp_path / "run.pt", SETTINGS[settings]
    whole = run(**options)
    first = run(sampling(stop, interrupt), checkpoint=path, **options)
    assert not first.finished
    assert len(first.losses) == stop
    second = run(checkpoint=path, **options)
    assert second.finished
    assert_identical(second, whole)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_run_stopped_early_is_the_start_of_the_whole_run_and_can_be_resumed(settings: str, tmp_path: Path) -> None:
    """`stop` ends the run as an interrupt would; a schedule stays that of the whole run."""
    path, options = tmp_path / "run.pt", SETTINGS[settings]
    whole, first = run(**options), run(stop=7, checkpoint=path, **options)
    assert not first.finished
    assert first.losses == whole.losses[:7]
    assert_identical(run(checkpoint=path, **options), whole)


@pytest.mark.parametrize("algorithm", [fomaml, reptile, joint])
def test_resuming_works_for_every_algorithm(algorithm, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(sampling(6, interrupt), algorithm=algorithm, checkpoint=path)
    assert_identical(run(algorithm=algorithm, checkpoint=path), run(algorithm=algorithm))


def test_a_replayed_run_resumes_bit_for_bit_too(monkeypatch, tmp_path: Path) -> None:
    """Long runs replay a recorded graph; it is recorded anew after the interrupt."""
    monkeypatch.setattr(runs, "WORTH_TRACING", 3)
    path = tmp_path / "run.pt"
    whole = run()
    run(sampling(7, interrupt), checkpoint=path)
    assert_identical(run(checkpoint=path), whole)


@pytest.mark.parametrize("settings", ["Adam", "Adam, learned rate, schedule"])
def test_a_replayed_run_equals_an_ordinary_one(settings: str, monkeypatch) -> None:
    """The same losses to 1e-12, and the recording was really used."""
    ordinary = run(**SETTINGS[settings])
    monkeypatch.setattr(runs, "WORTH_TRACING", 3)
    used = []
    right = runs.Replay.__call__
    monkeypatch.setattr(runs.Replay, "__call__", lambda self, *a: (right(self, *a), used.append(self.graph))[0])
    replayed = run(**SETTINGS[settings])
    assert len(used) == ITERATIONS
    assert all(graph is not None for graph in used)
    assert replayed.losses == pytest.approx(ordinary.losses, rel=1e-12)
    assert largest_difference(replayed.theta, ordinary.theta) < 1e-12


def test_a_replayed_run_computes_tasks_of_other_shapes_in_the_ordinary_way(monkeypatch) -> None:
    """Every third batch has one support example more."""
    shots = lambda: iter([5, 5, 6] * 5)  # noqa: E731

    def draw_with(sizes):
        return lambda g: regression(4, next(sizes), 6, seed=int(torch.randint(1 << 30, (), generator=g)))

    ordinary = run(draw_with(shots()))
    monkeypatch.setattr(runs, "WORTH_TRACING", 3)
    assert run(draw_with(shots())).losses == pytest.approx(ordinary.losses, rel=1e-12)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {folder!r})
    import test_train as t
    t.run(t.sampling(13, lambda: os.kill(os.getpid(), signal.SIGKILL)), checkpoint={path!r})
"""


def test_killed_between_checkpoints_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """SIGKILL at iteration 13, the last checkpoint at 10: 11 to 13 are repeated, and no file is left behind."""
    path, here = tmp_path / "run.pt", Path(__file__).parent
    code = textwrap.dedent(KILLED).format(folder=str(here), path=str(path))
    folders = os.pathsep.join([str(here.parents[1]), str(here.parent)])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": folders}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(checkpoints.read_checkpoint(path)["losses"]) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert_identical(run(checkpoint=path), run())


def forgetting(part: str):
    """`Run.load`, but one part of the checkpoint is not restored."""
    right = runs.Run.load

    def load(self, path: Path) -> None:
        kept = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        right(self, path)
        if part == "optimizer":
            self.optimizer.load_state_dict(kept["optimizer"])
        if part == "generator":
            self.generator.set_state(kept["generator"])
        if part == "losses":
            self.result.losses = self.result.losses[:-1]

    return load


@pytest.mark.parametrize("part", ["optimizer", "generator", "losses"])
def test_resuming_without_one_part_of_the_checkpoint_would_be_noticed(part: str, monkeypatch, tmp_path: Path) -> None:
    """A planted bug: each part of the checkpoint is needed for equality to the last bit."""
    path, whole = tmp_path / "run.pt", run()
    run(sampling(7, interrupt), checkpoint=path)
    monkeypatch.setattr(runs.Run, "load", forgetting(part))
    with pytest.raises(AssertionError):
        assert_identical(run(checkpoint=path), whole)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = run(checkpoint=path)
    again = run(sampling(1, lambda: pytest.fail("a finished run must not draw tasks")), checkpoint=path)
    assert_identical(again, first)


def test_the_signal_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    run(sampling(2, interrupt))
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_outside_the_main_thread() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join(60)
    assert_identical(found[0], run())


# What a run computes.


def test_one_step_of_sgd_is_theta_minus_lr_times_the_gradient() -> None:
    """θ − η ∇, with the first tasks that the seed gives"""
    expected = maml(LEARNER, THETA, sample(seeded(3))).theta
    found = run(iterations=1, optimizer=torch.optim.SGD, lr=0.3).theta
    assert all(torch.allclose(found[k], THETA[k] - 0.3 * expected[k], rtol=1e-14) for k in THETA)


def test_reptile_through_sgd_interpolates_to_the_mean_of_the_adapted_parameters() -> None:
    """ε = 1 replaces θ by mean θ_i: Nichol et al. (2018), Algorithm 2"""
    step = reptile(LEARNER, THETA, sample(seeded(3))).theta
    found = run(iterations=1, algorithm=reptile, optimizer=torch.optim.SGD, lr=1.0).theta
    assert all(torch.allclose(found[k], THETA[k] - step[k], rtol=1e-14) for k in THETA)


def test_the_schedule_scales_each_step() -> None:
    """Step sizes η (1 − i / n): the same as two runs with a step size each"""
    both = run(iterations=2, optimizer=torch.optim.SGD, lr=0.4, schedule=lambda progress: 1 - progress).theta
    generator = seeded(3)
    by_hand = dict(THETA)
    for lr in (0.4, 0.2):
        gradient = maml(LEARNER, by_hand, sample(generator)).theta
        by_hand = {k: by_hand[k] - lr * gradient[k] for k in by_hand}
    assert all(torch.allclose(both[k], by_hand[k], rtol=1e-13) for k in THETA)


def test_training_lowers_the_loss_and_leaves_its_input_alone() -> None:
    before = {k: v.clone() for k, v in THETA.items()}
    losses = run(lambda generator: regression(4, 5, 6), iterations=40, lr=0.01).losses
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[k], THETA[k]) for k in THETA)


def test_seeds_fix_the_tasks() -> None:
    assert run(seed=3).losses == run(seed=3).losses
    assert run(seed=3).losses != run(seed=4).losses


def test_learned_rules_are_trained_and_the_learner_keeps_its_own() -> None:
    """φ ← φ − η ∂L/∂φ"""
    gradient = maml(LEARNER, THETA, sample(seeded(3)), LEARNER.rule.phi).phi["lr"]
    found = run(iterations=1, learn_rule=True, optimizer=torch.optim.SGD, lr=0.01)
    assert found.phi["lr"].item() == pytest.approx(0.1 - 0.01 * gradient.item(), rel=1e-12)
    assert LEARNER.rule.phi["lr"].item() == 0.1
    assert run(iterations=1).phi is None


@pytest.mark.parametrize("algorithm", [joint, reptile])
def test_learning_a_rule_needs_its_gradient(algorithm) -> None:
    with pytest.raises(ValueError, match="learn_rule=True needs an algorithm that gives the gradient of the rule"):
        run(algorithm=algorithm, learn_rule=True)


def test_the_best_validated_parameters_are_returned() -> None:
    """Scores 1, 5, 2 after iterations 5, 10, 14: the parameters of iteration 10 come back."""
    scores, seen = iter([1.0, 5.0, 2.0]), []

    def validate(theta, phi) -> float:
        seen.append({k: v.clone() for k, v in theta.items()})
        return next(scores)

    found = run(validate=validate)
    assert found.validation == [(5, 1.0), (10, 5.0), (14, 2.0)]
    assert all(torch.equal(found.theta[k], seen[1][k]) for k in THETA)
    assert not torch.equal(seen[1]["layers.0.weight"], seen[2]["layers.0.weight"])


def test_contrasts_train_through_the_same_loop() -> None:
    """Prototypical networks on tasks, and supervised training on batches of examples."""
    learner, theta = image_learner()
    tasks = images(2, 3, 1, 2)
    batch = Batch(tasks.support.x[0], tasks.support.y[0])
    prototypes = Prototypes(learner.model, temperature=1.0)
    for algorithm, who, data in ((prototypical, prototypes, tasks), (supervised, learner, batch)):
        losses = meta_train(algorithm, who, lambda _, d=data: d, 8, theta=theta, lr=0.05, progress=False).losses
        assert losses[-1] < losses[0]


# What goes wrong.


def test_divergence_stops_with_the_iteration_and_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    huge: list[float] = []
    count = sampling(7, lambda: huge.append(1e200))

    def draw(generator):
        tasks = count(generator)
        return tasks._replace(query=tasks.query._replace(y=tasks.query.y * (huge or [1.0])[0]))

    with pytest.raises(DivergedError, match="not finite at iteration 7 ") as caught:
        run(draw, checkpoint=path)
    assert str(path) in str(caught.value)
    assert "Try a smaller inner or outer step size" in str(caught.value)
    assert len(checkpoints.read_checkpoint(path)["losses"]) == 5
    assert_identical(run(checkpoint=path), run())


def test_divergence_without_a_checkpoint_says_so() -> None:
    with pytest.raises(DivergedError, match="no checkpoint is kept"):
        run(lr=1e200, iterations=5)


@pytest.mark.parametrize("length", [0, 1, 100, 1000, -1])
def test_a_truncated_checkpoint_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(checkpoint=path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="run.pt is truncated or not a checkpoint"):
        run(checkpoint=path)


class Malicious:
    """An object whose unpickling would create a file."""

    def __reduce__(self):
        return (open, ("hacked", "w"))


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    for content in (pickle.dumps(Malicious(), protocol=2), None):
        path.write_bytes(content) if content else torch.save({"format": checkpoints.FORMAT, "leaves": Malicious()}, path)
        with pytest.raises(CheckpointError, match="run.pt is truncated or not a checkpoint"):
            run(checkpoint=path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("content", [{"model": torch.ones(3)}, torch.ones(3), {"format": "another 1"}])
def test_a_foreign_checkpoint_is_refused(content, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="run.pt is foreign: expected format 'metalearn_utils checkpoint 2'"):
        run(checkpoint=path)


OTHER_RUNS = {
    "algorithm": {"algorithm": fomaml},
    "lr": {"lr": 0.5},
    "seed": {"seed": 4},
    "iterations": {"iterations": 20},
    "optimizer": {"optimizer": torch.optim.SGD},
    "shapes": {"learn_rule": True},
}


@pytest.mark.parametrize("change", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(sampling(3, interrupt), checkpoint=path)
    kept = path.read_bytes()
    with pytest.raises(CheckpointError, match="run.pt belongs to another run: expected .*, got .*") as caught:
        run(checkpoint=path, **OTHER_RUNS[change])
    assert change in str(caught.value)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("other", [{"steps": 3}, {"rule": sgd(0.2)}])
def test_a_checkpoint_of_another_learner_is_refused(other: dict, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(sampling(3, interrupt), checkpoint=path)
    learner = type(LEARNER)(**(vars(LEARNER) | other))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        meta_train(maml, learner, sample, ITERATIONS, theta=THETA, seed=3, checkpoint=path, progress=False)


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(moment: str, monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    checkpoints.write_atomically(path, {"old": 1})

    def fail(*args, **kwargs):
        if moment == "save":
            args[1].write(b"half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[moment], fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_atomically(path, {"new": 2})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(path, weights_only=True) == {"old": 1}


def test_a_checkpoint_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    """Before any iteration is spent."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"checkpoint: cannot write to .*file/run.pt"):
        run(sampling(1, lambda: pytest.fail("no iteration may be spent")), checkpoint=tmp_path / "file" / "run.pt")


@pytest.mark.parametrize(("settings", "message"), [
    ({"iterations": 0}, "iterations must be an integer >= 1, got 0"),
    ({"iterations": 2.5}, "iterations must be an integer >= 1, got 2.5"),
    ({"every": 0}, "every must be an integer >= 1, got 0"),
])
def test_bad_counts_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**settings)


def test_faulty_tasks_are_refused_in_long_runs_too(monkeypatch) -> None:
    """A recorded graph must not swallow the named error of its first call."""
    monkeypatch.setattr(runs, "WORTH_TRACING", 3)
    tasks = regression(4, 5, 6)
    faulty = tasks._replace(support=tasks.support._replace(x=tasks.support.x * float("nan")))
    with pytest.raises(ValueError, match="tasks.support.x must be finite"):
        run(lambda generator: faulty)


def test_theta_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="must have dtype torch.float64, as the examples, got torch.float32"):
        run(theta={k: v.float() for k, v in THETA.items()})
    assert THETA["layers.0.weight"].dtype == F64


def test_a_bar_is_shown_on_request_only(capsys) -> None:
    run()
    assert capsys.readouterr() == ("", "")
    run(progress=True)
    assert "14/14" in capsys.readouterr().err
