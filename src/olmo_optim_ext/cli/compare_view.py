"""
What ``olmo-optim compare`` shows while it works.
"""

import time
from collections import Counter
from typing import TYPE_CHECKING, Dict, Optional, Tuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from mixture_pretraining_stages.comparing.comparison import Comparison

if TYPE_CHECKING:
    from mixture_pretraining_stages.comparing.workers import Crew

__all__ = ["ENDED", "View"]

ENDED = ("complete", "diverged", "pruned", "failed")
"""States of runs that are over."""


class View:
    """
    A table of the arms that is kept up to date; on a console that is no terminal a line for each
    run that ends.
    """

    def __init__(self, comparison: Comparison, crew: "Crew", console: Console):
        self.crew, self.console = crew, console
        self.total = comparison.budget * len(comparison.arms)
        self._live: Optional[Live] = None
        self._known: Optional[Dict[Tuple[str, str], str]] = None
        self._began: Optional[Tuple[float, float]] = None

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self._live = Live(console=self.console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self) -> None:
        """Show how things are."""
        if self._live is not None:
            self._live.update(Group(self._table(), self._summary()), refresh=True)
            return
        states = {
            (arm, slot): state.value
            for arm, slots in self.crew.queue.slots.items()
            for slot, state in slots.items()
        }
        for key, state in states.items():
            if self._known is not None and state in ENDED and self._known.get(key) != state:
                arm, slot = key
                trial = self.crew.queue.trials[arm][slot][-1]
                loss = f", loss {trial.value:.4f}" if state == "complete" and trial.value else ""
                line = f"{arm} {slot}: {state}{loss}. {self._summary()}"
                self.console.print(line, highlight=False, soft_wrap=True)
        self._known = states

    def _table(self) -> Table:
        table = Table("arm", box=None)
        for title in ("done", "running", "failed", "lowest loss", "at lr"):
            table.add_column(title, justify="right")
        for arm, slots in self.crew.queue.slots.items():
            count = Counter(state.value for state in slots.values())
            done = sum(count[state] for state in ENDED)
            found = self.crew.queue.best(arm)
            table.add_row(
                arm,
                f"{done}/{self.total // len(self.crew.queue.slots)}",
                str(count["running"]),
                str(count["failed"] + count["diverged"]),
                *(("", "") if found is None else (f"{found[0]:.4f}", f"{found[1]:.4g}")),
            )
        return table

    def _summary(self) -> str:
        states = [s.value for slots in self.crew.queue.slots.values() for s in slots.values()]
        count = Counter(states)
        ended = sum(count[state] for state in ENDED)
        text = f"{ended} of {self.total} runs done, {count['running']} running"
        if self.crew.stopping.is_set() and not self.crew.queue.finished:
            return f"{text}, waiting for them to save"
        left = self._seconds_left(ended + sum(list(self.crew.running.values())))
        return text if left is None else f"{text}, {_duration(left)} left"

    def _seconds_left(self, done: float) -> Optional[float]:
        if self._began is None:
            self._began = time.monotonic(), done
        since, before = time.monotonic() - self._began[0], done - self._began[1]
        return (self.total - done) * since / before if before > 0 else None


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
