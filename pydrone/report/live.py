"""The live view of a training in a terminal: progress, time left, episodes, reward terms, time per stage."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TextIO

from pydrone.ops.packages import needed
from pydrone.ppo.training.meters import stages_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Minimum seconds between two updates.
INTERVAL = 0.1

REWARD = "env/reward/"

# (label, figure, format) of the first two columns.
EPISODES = (
    ("length", "episode_length", "{:.1f}"),
    ("reward", "episode_return", "{:.3f}"),
    ("success", "success_rate", "{:.0%}"),
    ("ended", "episodes", "{:.0f}"),
)
LEARNING = (
    ("value loss", "value_loss", "{:.4f}"),
    ("KL", "kl", "{:.4f}"),
    ("learning rate", "learning_rate", "{:.1e}"),
    ("action std", "action_std", "{:.3f}"),
)


def possible(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that supports drawing, and rich is installed."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and find_spec("rich") is not None


class LiveView:
    """A view below the printed lines, updated after each iteration. Needs rich. Use it in a ``with`` statement.

    Args:
        title: one line about the training.
        console: a rich console; None: standard output.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        with needed("rich", "the live view", "rich"):
            from rich.console import Console
            from rich.live import Live

        self.title = title
        self.console = console or Console()
        # No refresh thread: it would take time from the training and interfere with signal handlers that print.
        self._live = Live(console=self.console, auto_refresh=False)
        self._drawn = -math.inf

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def echo(self, line: str) -> None:
        """Prints a line above the view."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, figures: Mapping[str, float], iterations: int, left: float) -> None:
        """Shows the figures of an iteration, out of ``iterations``, with ``left`` seconds to go."""
        now = time.monotonic()
        due = now - self._drawn >= INTERVAL or figures["iteration"] >= iterations
        if due:
            self._drawn = now
        self._live.update(picture(self.title, figures, iterations, left), refresh=due)


def picture(title: str, figures: Mapping[str, float], iterations: int, left: float) -> RenderableType:
    """The contents of the view."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    done = int(figures["iteration"])
    minutes, seconds = divmod(round(left), 60)
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(ratio=1)
    for _ in range(3):
        bar.add_column(justify="right", no_wrap=True)
    bar.add_row(
        ProgressBar(total=iterations, completed=done),
        f"{done}/{iterations}",
        f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}",
        f"{figures['steps_per_second']:,.0f} steps/s",
    )
    rewards = {name.removeprefix(REWARD): x for name, x in figures.items() if name.startswith(REWARD)}
    whole = figures["time/iteration"]
    shares = stages_of(figures)
    shares["other"] = max(0.0, whole - sum(shares.values()))
    columns = {
        "episode": ((label, _number(figures.get(name), form)) for label, name, form in EPISODES),
        "reward per step": ((name, _number(x, "{:+.1e}")) for name, x in rewards.items()),
        "learning": ((label, _number(figures.get(name), form)) for label, name, form in LEARNING),
        f"time, {whole:.2f} s": ((stage, f"{x / whole:.0%}") for stage, x in shares.items()),
    }
    body = Table.grid(padding=(0, 3))
    parts = {name: list(rows) for name, rows in columns.items()}
    parts = {name: rows for name, rows in parts.items() if rows}
    body.add_row(*(Text(name, style="bold") for name in parts))
    body.add_row(*(_table(rows) for rows in parts.values()))
    return Group(Text(title, style="dim"), bar, body)


def _table(rows: Iterable[tuple[str, str]]) -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for label, value in rows:
        table.add_row(label, value)
    return table


def _number(x: float | None, form: str) -> str:
    """``x`` formatted, or a dash if it is unknown, as are the figures of episodes before one has ended."""
    return "-" if x is None or math.isnan(x) else form.format(x)
