"""A fair comparison of optimizers: every hand-made method tuned by the same number of trials, for the metric shown."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .baselines import KNOWS, Method
from .dotplots import Bar, dot_groups
from .judging import check_metric, higher, interval, judge, label, trajectory
from .rules import UpdateRule
from .tasks.problems import Problem
from .tuning import Tuned, try_values, tune



@dataclass(frozen=True)
class Row:
    """One method's results.

    Attributes:
        name: of the method.
        knows: what it knows of a task, one of `KNOWS`.
        scores: the metric on each test task, [seeds, tasks].
        oracle: the same with the best tried value of each test task, "tuned on the test task itself", [seeds, tasks].
        tuned: how it was tuned, once per set of training tasks; empty where nothing is.
        seconds: CPU seconds of tuning and testing.
        learned: whether the rule is a learned one.
    """

    name: str
    knows: str
    scores: Tensor
    oracle: Tensor
    tuned: tuple[Tuned, ...]
    seconds: float
    learned: bool = False

    @property
    def trials(self) -> int:
        """Trials that chose its value; 0 where nothing is tuned."""
        return len(self.tuned[0].values) if self.tuned else 0


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: the results by name, in the order of what the methods know.
        metric: what is shown and tuned for.
        steps: steps of each run.
    """

    rows: dict[str, Row]
    metric: str
    steps: int

    def __str__(self) -> str:
        return self.table()

    def table(self, seconds: bool = False, digits: int = 3) -> str:
        """Chosen value, trials, mean and per-task oracle of each method, grouped by what they know; CPU time if asked.

        "±" is half the 95 % interval of the mean over the tasks or seeds named beside it.
        """
        cells = [["", "chosen", "trials", "mean ± 95 %", "over", "per-task oracle"] + ["CPU s"] * seconds]
        for knows, rows in self._groups().items():
            cells += [[f"knows {knows}"]] + [_cells(row, seconds, digits) for row in rows]
        widths = [max(len(line[i]) for line in cells if i < len(line)) for i in range(len(cells[0]))]
        title = f"{label(self.metric, self.steps)} ({'higher' if higher(self.metric) else 'lower'} is better)"
        return "\n".join([title] + ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells])

    def difference(self, one: str, other: str) -> tuple[float, float, str]:
        """Mean of `one` minus `other`, task by task, with its 95 % half width and unit, as `interval`.

        Tasks on which both diverged count as no difference.

        Raises:
            ValueError: a name that is not in the comparison.
        """
        if unknown := [name for name in (one, other) if name not in self.rows]:
            raise ValueError(f"one and other must be among {list(self.rows)}, got {unknown[0]!r}")
        a, b = self.rows[one].scores, self.rows[other].scores
        return interval(torch.where(a == b, 0.0, a - b))

    def figure(self, *, digits: int = 3, xlabel: str = "", ax: Axes | None = None, **limits: Any) -> Figure:
        """One row per method: mean and 95 % interval, to `digits`; the upright tick is the per-task oracle.

        `xlabel` is the metric by default; `limits` as for `dot_groups`.
        """
        groups = {f"knows {knows}": [_bar(row, digits) for row in rows] for knows, rows in self._groups().items()}
        xlabel = f"{xlabel or label(self.metric, self.steps)}\nupright tick: tuned on each test task itself"
        return dot_groups(groups, xlabel=xlabel, ax=ax, **limits)

    def _groups(self) -> dict[str, list[Row]]:
        groups = {knows: [row for row in self.rows.values() if row.knows == knows] for knows in KNOWS}
        return {knows: rows for knows, rows in groups.items() if rows}


def compare(
    methods: Sequence[Method],
    learned: Mapping[str, UpdateRule | Sequence[UpdateRule]],
    train: Problem | Sequence[Problem],
    test: Problem | Sequence[Problem],
    steps: int,
    metric: str = "final",
    trials: int = 16,
) -> Comparison:
    """Tune each method on the training tasks by the same number of trials, and judge all on the test tasks.

    Args:
        methods: hand-made ones, from `baselines` and `known_scale`.
        learned: learned rules by name; several rules under one name are its meta-training seeds.
        train: the tasks to tune on: one problem, or one per seed.
        test: the tasks to judge on: one problem, or one per seed, with equal numbers of tasks.
        steps, metric, trials: as for `tune`.

    Raises:
        ValueError: a name twice, numbers of seeds or tasks that do not match, or what `tune` refuses.
    """
    names = [m.name for m in methods] + list(learned)
    if len(set(names)) < len(names):
        raise ValueError(f"names must differ, got {sorted({n for n in names if names.count(n) > 1})} more than once")
    trains, tests = _listed(train), _listed(test)
    if not trains or len({len(problem) for problem in tests}) != 1:
        raise ValueError(f"train and test must hold problems, test of equal numbers of tasks, got {[*map(len, tests)]}")
    for problem in (*trains, *tests):
        check_metric(metric, problem)
    rows = [_judged(m, trains, tests, steps, metric, trials) for m in methods]
    rows += [_judged_learned(name, _listed(rules), tests, steps, metric) for name, rules in learned.items()]
    return Comparison({row.name: row for knows in KNOWS for row in rows if row.knows == knows}, metric, steps)


def check_fair(comparison: Comparison) -> None:
    """Raise a ValueError if the methods had unequal trials, or if a chosen value lies on the edge of those tried."""
    tuned = [(name, t) for name, row in comparison.rows.items() for t in row.tuned]
    counts = sorted({(name, len(t.values)) for name, t in tuned})
    if len({n for _, n in counts}) > 1:
        raise ValueError(f"every method must have the same number of trials, got {counts}")
    for name, t in tuned:
        if t.edge:
            raise ValueError(
                f"the value chosen for {name!r}, {t.chosen:.3g}, lies on the edge of those tried, "
                f"{min(t.values):.3g} to {max(t.values):.3g}: give more trials or another grid"
            )


def _judged(method: Method, trains: list, tests: list, steps: int, metric: str, trials: int) -> Row:
    begun, tuned = time.process_time(), ()
    if method.grid is None:
        scores = oracle = torch.stack([judge(metric, p, *trajectory(method.make(), p, steps)) for p in tests])
    else:
        tuned = tuple(tune(method, p, steps, metric, trials) for p in trains)
        pairs = _matched(train=tuned, test=tests)
        tried = [try_values(method, t.values, p, steps, metric) for t, p in pairs]
        scores = torch.stack([s[t.values.index(t.chosen)] for s, (t, _) in zip(tried, pairs)])
        oracle = torch.stack([s.amax(0) if higher(metric) else s.amin(0) for s in tried])
    return Row(method.name, method.knows, scores, oracle, tuned, time.process_time() - begun)


def _judged_learned(name: str, rules: list, tests: list, steps: int, metric: str) -> Row:
    begun, pairs = time.process_time(), _matched(learned=rules, test=tests)
    scores = torch.stack([judge(metric, p, *trajectory(rule, p, steps)) for rule, p in pairs])
    knows = "L" if "lr" in rules[0].init(tests[0].theta) and "L" in tests[0].facts else "nothing"
    return Row(name, knows, scores, scores, (), time.process_time() - begun, learned=True)


def _listed(given: Any) -> list:
    """One problem or one rule (which is itself a tuple) as a list of one."""
    return [given] if isinstance(given, Problem | UpdateRule) else list(given)


def _matched(**lists: Sequence) -> list[tuple]:
    """The lists side by side, those with one entry repeated."""
    counts = {name: len(values) for name, values in lists.items()}
    most = max(counts.values())
    if any(n not in (1, most) for n in counts.values()):
        raise ValueError(f"seeds must match: one, or as many as the others, got {counts}")
    return list(zip(*(list(values) * (most // len(values)) for values in lists.values())))


def _cells(row: Row, seconds: bool, digits: int) -> list[str]:
    chosen = sorted({f"{t.chosen:.{digits}g}" for t in row.tuned}, key=float)
    mean, half, over = interval(row.scores)
    found = ["  " + row.name, " to ".join(chosen[:: max(1, len(chosen) - 1)]) or "-", str(row.trials or "-")]
    found += [f"{mean:.{digits}g} ± {half:.{digits - 1}g}" if math.isfinite(mean) else "diverges", over]
    return found + [f"{row.oracle.mean():.{digits}g}" if row.tuned else "-"] + [f"{row.seconds:.1f}"] * seconds


def _bar(row: Row, digits: int) -> Bar:
    mean, half, _ = interval(row.scores)
    tick = float(f"{row.oracle.mean():.{digits}g}") if row.tuned else None
    return Bar(row.name, float(f"{mean:.{digits}g}"), float(f"{half:.{digits - 1}g}"), tick, row.learned)
