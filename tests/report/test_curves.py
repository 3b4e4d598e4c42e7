"""``pydrone plot``: which runs form one curve, its points and its spread."""

from __future__ import annotations

import json

import pytest

from pydrone.cli import main as cli
from pydrone.ppo.training.run_log import CONFIG, RunLog
from pydrone.report import curves


def write(folder, rows, **settings):
    """A run's folder with these settings and figures; each iteration has 80 steps and takes one second."""
    folder.mkdir(parents=True)
    if settings:
        (folder / CONFIG).write_text(json.dumps(settings))
    log = RunLog(folder, tensorboard=False)
    for iteration, episode_length in rows:
        figures = {"iteration": iteration, "steps_per_second": 80.0, "time/iteration": 1.0}
        log.write(figures | {"episode_length": episode_length, "episode_return": episode_length / 10})
    log.close()
    return folder


@pytest.fixture
def four(tmp_path):
    """Two seeds of one setting, one run with another setting, and one with unknown settings."""
    setting = {"env": "quadrotor", "num_envs": 4, "ppo": {"gamma": 0.99, "hidden_dims": [8, 8]}}
    other = setting | {"ppo": {"gamma": 0.9, "hidden_dims": [8, 8]}}
    runs = tmp_path / "runs"
    write(runs / "a1", [(1, 10.0), (2, 20.0), (3, 30.0)], **setting, seed=1, run_dir="a1", resume=None)
    write(runs / "a2", [(1, 20.0), (2, 40.0)], **setting, seed=2, run_dir="a2", resume="x.pt")
    write(runs / "b", [(1, 5.0)], **other, seed=1)
    write(runs / "c", [(1, 1.0)])
    return runs


def grouped(folder):
    return curves.group([curves.read(run) for run in curves.find([folder])])


def test_runs_that_differ_only_in_the_seed_are_a_group(four):
    groups = grouped(four)
    assert [len(group.curves) for group in groups] == [2, 1, 1]
    assert [group.label for group in groups] == ["gamma 0.99 (2 seeds)", "gamma 0.9", str(four / "c")]


def test_runs_of_the_same_seed_are_counted_as_runs(tmp_path):
    for name in "ab":
        write(tmp_path / name, [(1, 1.0)], env="quadrotor", seed=3)
    assert [group.label for group in grouped(tmp_path)] == ["quadrotor (2 runs)"]


def test_points(tmp_path):
    """80 steps and one second per iteration; a NaN gives no point, but its steps count."""
    curve = curves.read(write(tmp_path / "a", [(1, 10.0), (2, float("nan")), (3, 30.0)]))
    assert curves.points(curve, "episode_length", "iteration") == ([1, 3], [10.0, 30.0])
    assert curves.points(curve, "episode_length", "steps") == ([80, 240], [10.0, 30.0])
    xs, _ = curves.points(curve, "episode_length", "time")
    assert xs == pytest.approx([1 / 60, 3 / 60])
    # a run resumed after iteration 4: earlier iterations are assumed to have the steps of its first one
    resumed = curves.read(write(tmp_path / "b", [(5, 10.0), (6, 11.0)]))
    assert curves.points(resumed, "episode_length", "steps")[0] == [400, 480]


def test_spread():
    grid, low, mean, high = curves.spread([([0, 2, 4], [0, 2, 4]), ([1, 3], [10, 14])])
    assert grid.tolist() == [1, 2, 3]
    assert low.tolist() == [1, 2, 3] and high.tolist() == [10, 12, 14] and mean.tolist() == [5.5, 7, 8.5]
    assert [x.tolist() for x in curves.spread([([0, 1], [0, 1]), ([2, 3], [0, 1])])] == [[], [], [], []]


def test_results(four):
    first, second, third = curves.results(grouped(four))
    assert (first["runs"], first["iterations"]) == (2, 2)
    assert first["episode_length"] == pytest.approx((25.0, 20.0, 30.0))  # means 20 and 30
    assert second["episode_return"] == pytest.approx((0.5, 0.5, 0.5)) and third["runs"] == 1


def test_results_of_the_last_ten_iterations(tmp_path):
    write(tmp_path / "a", [(i, 0.0 if i <= 10 else 10.0) for i in range(1, 20)])
    (row,) = curves.results(grouped(tmp_path))
    assert row["episode_length"][0] == pytest.approx(9.0)


def test_find(four, tmp_path):
    assert [x.name for x in curves.find([four / "b", four])] == ["b", "a1", "a2", "c"]
    with pytest.raises(FileNotFoundError, match="no run folder, and none in it"):
        curves.find([tmp_path / "gone"])


def drawn(monkeypatch, *args, **kwargs):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    curves.draw(*args, **kwargs)
    return figures[0]


def test_a_group_is_drawn_as_its_mean_and_band(four, monkeypatch, tmp_path):
    figure = drawn(monkeypatch, grouped(four), tmp_path / "x.png", figures=["episode_length"])
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    mean = lines["gamma 0.99 (2 seeds)"]
    assert mean.get_xdata().tolist() == [1, 2] and mean.get_ydata().tolist() == [15, 30]
    assert len(axis.collections) == 1  # the band; a single run has none
    band = axis.collections[0].get_paths()[0].get_extents()
    assert (band.x0, band.x1, band.y0, band.y1) == (1, 2, 10, 40)
    assert list(lines["gamma 0.9"].get_ydata()) == [5.0] and str(four / "c") in lines
    assert len(axis.lines) == 5  # the three curves and the two runs of the group
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "gamma 0.99 (2 seeds)",
        "gamma 0.9",
        str(four / "c"),
    ]


def test_panels(four, monkeypatch, tmp_path):
    """By default the figures of a run's own plot that are known; the lowest panel of each column is labelled."""
    figure = drawn(monkeypatch, grouped(four), tmp_path / "x.png", x="steps")
    assert [axis.get_ylabel() for axis in figure.axes] == ["episode length [steps]", "reward of an episode"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["environment steps"] * 2
    with pytest.raises(ValueError, match=r"figure: expected some of episode_length, .*; got nope, nor"):
        curves.draw(grouped(four), tmp_path / "x.png", figures=["nope", "reward", "nor"][::2])


def test_plot(four, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", str(four / "a1"), str(four / "a2"), "--x", "time"]) == 0
    said = capsys.readouterr().out
    assert "quadrotor (2 seeds)" in said and "25.0 (20.0 to 30.0)" in said and "2.500 (2.000 to 3.000)" in said
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plot", str(four / "b"), "--figure", "episode_return"]) == 0
    assert (four / "b" / "learning_curves.png").is_file()
    assert cli.main(["plot", str(four), "--out", "made/all.png"]) == 0
    assert (tmp_path / "made" / "all.png").is_file()


def test_what_cannot_be_plotted_is_one_sentence(four, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    empty = write(tmp_path / "empty", [])
    for argv, message in (
        ((empty,), f"{empty}/progress.jsonl: expected a line per iteration, got none"),
        ((tmp_path / "gone",), f"{tmp_path}/gone: no run folder, and none in it: expected a file progress.jsonl"),
    ):
        assert cli.main(["plot", *map(str, argv)]) == 1
        assert capsys.readouterr().err == f"pydrone: {message}\n"
