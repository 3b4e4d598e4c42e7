"""The live view: its contents, and where it is not drawn."""

from __future__ import annotations

import io
import math
import os
import re
import sys

import pytest

from pydrone.report import live

pytest.importorskip("rich")

FIGURES = {
    "iteration": 142,
    "steps_per_second": 67123.4,
    "episode_length": 812.44,
    "episode_return": 12.3456,
    "success_rate": 0.834,
    "episodes": 97.0,
    "env/reward/target": 0.01234,
    "env/reward/crash": -2.5e-5,
    "env/distance": 0.3,
    "value_loss": 0.0123,
    "kl": 0.0098,
    "learning_rate": 3e-4,
    "action_std": 0.51,
    "time/iteration": 2.0,
    "time/env": 0.5,
    "time/policy": 0.2,
    "time/storage": 0.06,
    "time/gae": 0.04,
    "time/update": 1.1,
}


def drawn(figures: dict[str, float], width: int = 110) -> list[str]:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(live.picture("quadrotor", figures, 301, 3725.0))
    return console.file.getvalue().splitlines()


def test_what_it_shows():
    title, bar, head, *rows = drawn(FIGURES)
    assert title.strip() == "quadrotor"
    assert re.fullmatch(r"━+\S? +142/301  left 1:02:05  67,123 steps/s", bar.strip())
    whole = 110 - len("  142/301  left 1:02:05  67,123 steps/s")
    assert bar.count("━") == pytest.approx(whole * 142 / 301, abs=1)
    assert head.split() == ["episode", "reward", "per", "step", "learning", "time,", "2.00", "s"]
    text = "\n".join(rows)
    for expected in (
        r"length +812\.4 ",
        r"reward +12\.346 ",
        r"success +83% ",
        r"ended +97 ",
        r"target +\+1\.2e-02 ",
        r"crash +-2\.5e-05 ",
        r"value loss +0\.0123 ",
        r"KL +0\.0098 ",
        r"learning rate +3\.0e-04 ",
        r"action std +0\.510 ",
        r"env +25%",
        r"policy +10%",
        r"storage +3%",
        r"gae +2%",
        r"update +55%",
        r"other +5%",
    ):
        assert re.search(expected, text), expected
    assert "distance" not in text and all(len(line) <= 110 for line in rows)


def test_an_iteration_replayed_whole_has_no_stages():
    figures = {name: x for name, x in FIGURES.items() if not name.startswith("time/")}
    text = "\n".join(drawn(figures | {"time/iteration": 2.0, "time/replay": 1.5}))
    assert re.search(r"replay +75%", text) and re.search(r"other +25%", text) and "policy" not in text


def test_what_is_not_known_yet_is_a_dash():
    unknown = dict.fromkeys(("episode_length", "episode_return", "success_rate"), math.nan)
    figures = {name: x for name, x in FIGURES.items() if not name.startswith("env/")} | unknown
    text = "\n".join(drawn(figures))
    assert "nan" not in text and "reward per step" not in text
    assert re.search(r"length +- ", text) and re.search(r"success +- ", text)


def test_a_narrow_terminal_is_not_left():
    assert all(len(line) <= 60 for line in drawn(FIGURES, 60))


def test_lines_come_above_the_view():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    with live.LiveView("quadrotor", console) as view:
        view.show(FIGURES, 301, 10.0)
        view.echo("[bold] a line of 3 with no markup")
        view.show({**FIGURES, "iteration": 301}, 301, 0.0)
    text = console.file.getvalue()
    above, below = text.split("[bold] a line of 3 with no markup\n")
    assert "142/301" in above and "301/301" in below
    assert text.endswith("\x1b[?25h"), "the cursor is shown again"


def test_it_is_not_drawn_more_often_than_it_can_be_read(monkeypatch):
    from rich.console import Console

    clock = [0.0]
    monkeypatch.setattr(live, "INTERVAL", 0.125)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    with live.LiveView("quadrotor", console) as view:
        for i in range(1, 31):
            clock[0] = i / 64
            view.show({**FIGURES, "iteration": i}, 301, 10.0)
        seen = re.findall(r"(\d+)/301", console.file.getvalue())
    assert [int(x) for x in seen] == [1, 9, 17, 25]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_where_it_is_possible(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert live.possible(Terminal()) and not live.possible(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not live.possible(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live, "find_spec", lambda name: None)
    assert not live.possible(Terminal()), "without rich: plain lines"


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_a_training_in_a_terminal(tmp_path, monkeypatch):
    """A whole training on a pseudo-terminal: the view instead of the lines, and the same files."""
    import pty

    for module in ("tyro", "matplotlib"):
        pytest.importorskip(module)
    sizes = ("--env", "quadrotor", "--device", "cpu", "--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2")
    argv = ["train", *sizes, "--iterations", "3", "--no-tensorboard", "--run-dir", str(tmp_path / "run")]
    code = f"import sys; from pydrone.cli.main import main; sys.exit(main({argv!r}))"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="110", LINES="40")
        os.execv(sys.executable, [sys.executable, "-c", code])
    output = b""
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # on Linux the other end has closed
            break
        if not part:
            break
        output += part
    _, status = os.waitpid(pid, 0)
    text = output.decode()
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert "3/3  left 0:00:00" in text and "All 3 iterations are done." in text and "\x1b[" in text
    assert "3/3  reward" not in text
    assert (tmp_path / "run" / "model_3.pt").exists() and str(tmp_path / "run") in re.sub(r"\s+", "", text)
