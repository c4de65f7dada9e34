"""The speed of the library beside learn2learn, measured in one run; red only at three times the budget.

`make bench` measures the same with care; this is what every test run can afford.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("learn2learn")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench  # noqa: E402
from metalearn_utils import Learner, mlp, mse, params_of, sgd  # noqa: E402
from metalearn_utils.tasks.sinusoids import Sinusoids  # noqa: E402
from metalearn_utils.trace import Replay  # noqa: E402

SLACK = 3


@pytest.mark.parametrize("kind", bench.ALGORITHMS)
def test_batched_tasks_are_many_times_faster_than_learn2learn(kind, capsys):
    tasks = Sinusoids().sample(
        25, shots=10, queries=10, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    model = mlp(generator=torch.Generator().manual_seed(0))
    settings = (model, mse, tasks, bench.RATE, 5, kind)
    learner, theta = Learner(model, mse, sgd(bench.RATE), 5), params_of(model)
    replay = Replay(bench.ALGORITHMS[kind], learner)
    runs = {
        "learn2learn": lambda: bench.peer(*settings),
        "library": lambda: bench.library(*settings),
        "replayed": lambda: replay(learner, theta, tasks),
    }
    times = bench.contest(runs, rounds=3)
    eager, replayed = (bench.ratio(times, "learn2learn", name)[0] for name in ("library", "replayed"))
    with capsys.disabled():
        print(f"\n{kind}: {eager:.1f}x learn2learn (budget 15x), replayed {replayed:.1f}x (budget 30x)")
    assert eager > 15 / SLACK and replayed > 30 / SLACK


def test_recomputing_a_step_keeps_memory_small():
    growth = (bench.memory_of(20, True)[0] - bench.memory_of(5, True)[0]) / 15
    assert growth < 1.5 * SLACK
    assert growth < (bench.memory_of(20, False)[0] - bench.memory_of(5, False)[0]) / 15 / 2
