"""What the outer loop shows and how it is stopped: the bar, Ctrl-C, and counts that make sense."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


def check_counts(**counts: int) -> None:
    """Raise a ValueError that names the first count that is no integer >= 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def bar_of(done: int, total: int, progress: bool) -> tqdm:
    """A progress bar that starts at `done`; silent if `progress` is False."""
    return tqdm(total=total, initial=done, disable=not progress, mininterval=0.5, leave=False)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or Jupyter's stop button) into a stop after the current iteration."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    hit: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        hit.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(hit)
    finally:
        signal.signal(signal.SIGINT, before)
