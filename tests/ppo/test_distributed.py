"""Distributed training: two processes equal one with all their environments, and they end together.

A pair of processes runs all scenarios of ranks_worker.py once; the tests check its results.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import one_rank
import pytest
import ranks_worker as worker
import torch

from pydrone.cli import main as cli
from pydrone.cli.common import device_of
from pydrone.envs import make
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.distributed import ALONE, Launch, MeanGradients, Ranks, merge_moments
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training import checkpoint
from pydrone.report import learning_curve, runs

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this PyTorch lacks gloo"
)

LIMIT = 300  # seconds, for a busy machine


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict:
    """The results of the two ranks: "rank0", "rank1", "failing0", and the folder."""
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, worker.__file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert (folder / "rank0.pt").exists() and (folder / "rank1.pt").exists(), "\n".join(said)
    # They hold only figures and tensors, so weights_only loads them.
    found = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("rank0", "rank1", "failing0")}
    return found | {"folder": folder, "said": said}


def close(a: object, b: object, path: str = "") -> None:
    """Nested containers of numbers, equal up to float32 rounding amplified by a few Adam steps."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            close(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            close(x, y, f"{path}/{i}")
    else:
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6, equal_nan=True, msg=lambda text: f"{path}: {text}")


def same(a: object, b: object) -> bool:
    """Whether nested containers are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)


# ----------------------------------------------------------------------------------------------- two equal one


@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_equal_one_with_all_the_environments(case, pair, monkeypatch):
    """Figures, weights, statistics, Adam's state and the learning rate; the two ranks are equal bit for bit."""
    monkeypatch.setattr(torch, "randn_like", torch.randn_like)
    one = worker.learn(case, 0, 1)
    two, other = pair["rank0"][case], pair["rank1"][case]
    assert same(two, other)
    close(two, one)
    assert one["figures"][-1]["episodes"] > 0 and one["figures"][-1]["env/distance"] > 0
    if case == "plain":
        assert one["rate"] != pytest.approx(1e-3)
    if case == "early stop":
        assert 1 < one["figures"][-1]["minibatches"] < 8
    if case == "normalized":
        assert one["moments"]["count"] < worker.ITERATIONS * 6 * worker.T, "all steps are valid"


def test_training_on_one_ranks_environments_alone_differs(pair, monkeypatch):
    """So the comparison above can fail."""
    monkeypatch.setattr(torch, "randn_like", torch.randn_like)
    monkeypatch.setattr(worker, "N", 1)
    with pytest.raises(AssertionError):
        close(pair["rank0"]["plain"], worker.learn("plain", 0, 1))


# ----------------------------------------------------------------------------------------------- the messages


def test_moments_of_parts_merge_to_those_of_all():
    """By hand: {1, 3}, {} and {8} have mean 4 and M2 9 + 1 + 16; and two such columns."""
    count = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    mean = torch.tensor([2.0, math.nan, 8.0], dtype=torch.float64)
    m2 = torch.tensor([2.0, math.nan, 0.0], dtype=torch.float64)
    assert [x.item() for x in merge_moments(count, mean, m2)] == [3, 4, 26]
    total, means, m2s = merge_moments(count, torch.stack((mean, mean + 1), 1), torch.stack((m2, m2), 1))
    assert (total.item(), means.tolist(), m2s.tolist()) == (3, [4, 5], [26, 26])
    x = torch.randn(4, 50, 3, dtype=torch.float64) + 100
    parts = torch.full((4,), 50.0).double(), x.mean(1), (x - x.mean(1, keepdim=True)).square().sum(1)
    _, means, m2s = merge_moments(*parts)
    torch.testing.assert_close(means, x.flatten(0, 1).mean(0))
    torch.testing.assert_close(m2s, x.flatten(0, 1).var(0) * 199)
    assert [x.item() for x in merge_moments(count * 0, mean, m2)] == [0, 0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_messages(rank, pair):
    found = pair[f"rank{rank}"]["collectives"]
    assert found["sum"].tolist() == [2, 1]
    assert found["gather"].tolist() == [5, 6]
    # Gradients 1 of one sample and 5 of three: (1 + 15) / 4; figures 10 and 2.
    for name, gradient, figure in (("mean", 4.0, 4.0), ("of one", 1.0, 10.0), ("of none", 0.0, 0.0)):
        gradients, figures, kept = found[name]
        assert gradients.tolist() == [[gradient] * 2] * 2 and figures.tolist() == [figure] and kept, name
    assert found["frozen"] is None
    # {.5, 1.5}, {7.5, 8.5} and {2.5, 3.5}, {7.5, 8.5}: means 4.5 and 5.5; M2 .5 + .5 + 4 * 3.5^2, and 4 * 2.5^2
    count, mean, m2 = found["moments"]
    assert (count.item(), mean.tolist(), m2.tolist()) == (4, [4.5, 5.5], [50, 26])
    assert found["broadcast"].tolist() == [0, 0, 0]
    assert found["objects"] == [{"rank": 0}, {"rank": 1}]
    assert (found["seed"] == 7) == (rank == 0) and 0 <= found["seed"] < 2**31


def test_ranks_begin_with_the_first_ones_weights_and_numbers_of_their_own(pair):
    first, second = (pair[f"rank{rank}"]["begun"] for rank in range(2))
    assert same(first["policy"], second["policy"])
    assert not torch.equal(first["drawn"], second["drawn"])
    assert not torch.equal(first["order"], second["order"])


def test_one_process_sends_nothing(monkeypatch):
    for name in ("all_reduce", "all_gather_into_tensor", "broadcast", "all_gather_object", "gather_object"):
        monkeypatch.setattr(torch.distributed, name, None)
    monkeypatch.setattr(torch.distributed, "all_gather_single", None, raising=False)
    x = torch.ones(3)
    assert Ranks.found() is ALONE and not ALONE.several
    assert ALONE.sum_(x) is x and ALONE.gather(x).tolist() == [[1, 1, 1]] and ALONE.to_first(x) == [x]
    ALONE.broadcast_([x]), ALONE.check_same({})
    trainer = Trainer(worker.Points(0, 3), worker.settings(ppo={"normalize_obs": True}), echo=lambda _: None)
    trainer.iterate(), trainer.save()
    assert trainer.learner._over_ranks is None


def test_one_process_that_sends_its_messages_trains_as_one_that_does_not(tmp_path):
    one_rank.compare("cpu", "gloo", tmp_path)


def test_a_parameter_without_a_gradient_counts_as_zeros():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    used.sum().backward()
    MeanGradients(ALONE, [used, unused], 1)(torch.zeros(1), 4)
    assert used.grad.tolist() == [1, 1] and unused.grad.tolist() == [0, 0]


class Counted(Ranks):
    """Two ranks simulated by one; records what is sent."""

    def __init__(self) -> None:
        self.group, self.rank, self.world_size, self.sent = None, 0, 2, []

    def sum_(self, x):
        self.sent.append(("all-reduce", x.nbytes))
        return x.mul_(2)

    def gather(self, x):
        self.sent.append(("all-gather", x.nbytes))
        return torch.stack((x, x))

    def broadcast_(self, tensors) -> None:
        pass

    def gather_objects(self, x):
        return [x, x]


def test_the_sizes_in_the_document():
    """What an iteration sends with the default settings, and with everything normalised."""
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    table = [(row[1], int(row[2].replace(",", "")), int(row[3])) for row in rows if row[1].startswith("all-")]
    listed = [(text[:10], size) for text, size, count in table for _ in range(count)]
    ppo = PPOConfig(normalize_obs=True, normalize_values=True, normalize_rewards=True)
    env = make("quadrotor", num_envs=4)
    ranks = Counted()
    trainer = Trainer(env, TrainConfig(env="quadrotor", tensorboard=False, ppo=ppo), echo=print, ranks=ranks)
    trainer.iterate()
    ranks.sent.clear()
    trainer.iterate()
    assert ranks.sent == listed
    assert f"{sum(x.numel() for x in trainer.policy.parameters()):,} parameters" in text


# ----------------------------------------------------------------------------------------------- ends


def test_what_is_not_finite_on_one_rank_ends_all(pair):
    for rank in range(2):
        found = pair[f"rank{rank}"]["not finite"]
        assert found["iteration"] == 2 and "the rewards of the environment are not finite (rank 1)" in found["error"]


def test_a_signal_to_one_rank_ends_all_in_the_same_iteration(pair):
    first, second = (pair[f"rank{rank}"]["interrupted"] for rank in range(2))
    assert first["outcome"] == second["outcome"] == ["interrupted", 2]
    folder = pair["folder"] / "interrupted"
    assert [path.name for path in folder.glob("*model*")] == ["model_2.pt"]
    assert sum("steps/s" in line for line in first["lines"]) == 2 and second["lines"] == []
    assert len(learning_curve.read(folder)) == 2


def test_logs_with_different_keys(pair):
    for rank in range(2):
        figures = pair[f"rank{rank}"]["logs"]["figures"]
        assert [row["env/a"] for row in figures] == [2, 2, 2]
        assert [row.get("env/b") for row in figures] == [None, 3, 3]


def test_ranks_with_other_settings_are_told(pair):
    message = "num_epochs: expected the same on every rank, got 2 on rank 0 and 3 on rank 1"
    assert pair["rank0"]["other settings"]["error"] == pair["rank1"]["other settings"]["error"] == message


def test_ranks_that_drift_apart_are_told(pair):
    for rank in range(2):
        assert "the ranks' policies have drifted apart" in pair[f"rank{rank}"]["drifted"]["error"]


def test_a_failure_on_one_rank_is_seen_on_the_other_and_keeps_what_was_learnt(pair):
    found = pair["failing0"]
    assert found["error"].startswith("rank 0 of 2 cannot go on, another has ended or is out of reach")
    assert "RuntimeError: the simulator" in pair["said"][1]
    assert [path.name for path in (pair["folder"] / "failing").glob("*model*")] == ["model_2.pt"]
    state = checkpoint.load(pair["folder"] / "failing" / "model_2.pt")
    assert state["iteration"] == 2 and all(x.isfinite().all() for x in state["policy"].values())


# ----------------------------------------------------------------------------------------------- checkpoints


def test_resumed_equals_uninterrupted(pair):
    whole, parts = (checkpoint.load(pair["folder"] / name / "model_5.pt") for name in ("whole", "parts"))
    for state in (whole, parts):
        del state["config"]
    assert len(whole["others"]) == 1 and not same(whole["others"][0], whole["progress"])
    assert same(whole, parts)
    assert not any("Resumed" in line for line in pair["rank0"]["resumed"]["said"])


def alone(path: Path, **kwargs) -> tuple[Trainer, list[str]]:
    lines: list[str] = []
    config = worker.settings(resume=str(path), **kwargs)
    trainer = Trainer(worker.Points(0, worker.N), config, echo=lines.append)
    trainer.train()
    return trainer, lines


def test_a_checkpoint_of_another_number_of_processes(pair):
    """Networks and statistics are restored; the log says what begins anew."""
    ppo = worker.CASES["normalized"] | worker.CASES["gru"]
    path = pair["folder"] / "parts" / "model_3.pt"
    trainer, lines = alone(path, iterations=4, ppo=ppo)
    said = (
        "Resumed at iteration 3; its processes were 2, these are 1: all episodes begin anew, with other random numbers."
    )
    assert lines[0] == said and trainer.iteration == 4
    begun, _ = alone(path, iterations=3, ppo=ppo)  # nothing left to do
    assert same(dict(begun.policy.state_dict()), checkpoint.load(path)["policy"])
    (line,) = [line for line in pair["rank0"]["resumed"]["of one"] if line.startswith("Resumed")]
    assert "its processes were 1, these are 2" in line
    assert checkpoint.load(pair["folder"] / "more" / "model_3.pt")["iteration"] == 3


def test_a_checkpoint_is_evaluated_as_any(pair):
    run = runs.load(pair["folder"] / "parts")
    policy = runs.load_policy(run, worker.Points(0, 4))
    assert run.iteration == 5 and policy.mode(torch.zeros(4, 3)).shape == (4, 2)


# ----------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK: expected a number below WORLD_SIZE=2, as torchrun sets; not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected a number below WORLD_SIZE=2, got 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number, as torchrun sets, got 'two'"),
    ],
)
def test_what_torchrun_sets(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Launch()


def test_a_single_process_is_not_distributed(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    assert Launch().world_size == 1


def test_a_gpu_that_has_a_number_already(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    assert device_of(None, 1) == torch.device("cuda:1") == seen[0]
    with pytest.raises(ValueError, match=r"--device cuda:1: expected cuda, each of several processes takes that of"):
        device_of("cuda:1", 0)
    with pytest.raises(ValueError, match=r"cuda:2, of LOCAL_RANK: expected one of 2 CUDA devices"):
        device_of("cuda", 2)


SMALL = ("--env", "quadrotor", "--device", "cpu", "--num-envs", "8", "--num-steps", "8", "--hidden-dims", "16", "16")
SMALL += ("--no-tensorboard", "--num-epochs", "1", "--no-live")


def torchrun(*argv: str, processes: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "pydrone"]
    return subprocess.Popen(
        [*command, "train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> str:
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out + err
    return out


@pytest.fixture
def installed() -> None:
    for module in ("tyro", "matplotlib"):
        pytest.importorskip(module)


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_the_command_trains_resumes_and_is_bit_equal(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = finished(torchrun(*SMALL, "--iterations", "6", "--run-dir", str(whole)))
    assert "quadrotor: 2 processes of 8 environments on cpu" in out
    assert sum("steps/s" in line for line in out.splitlines()) == 6, "one log"
    finished(torchrun(*SMALL, "--iterations", "3", "--run-dir", str(parts)))
    out = finished(torchrun("--resume", str(parts), "--iterations", "6"))
    assert out.count("Resuming from") == 1
    first, second = (checkpoint.load(run / "model_6.pt") for run in (whole, parts))
    assert first.pop("config")["num_envs"] == second.pop("config")["num_envs"] == 8
    assert same(first, second)
    assert len(learning_curve.read(whole)) == 6 and (whole / "learning_curve.png").exists()
    assert cli.main(["eval", str(whole), "--episodes", "4", "--steps", "20"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_torchrun_with_one_process_is_the_command_alone(tmp_path):
    folders = tmp_path / "torchrun", tmp_path / "alone"
    finished(torchrun(*SMALL, "--iterations", "2", "--run-dir", str(folders[0]), processes=1))
    assert cli.main(["train", *SMALL, "--iterations", "2", "--run-dir", str(folders[1])]) == 0
    first, second = (checkpoint.load(folder / "model_2.pt") for folder in folders)
    assert same(first["policy"], second["policy"]) and same(first["learner"], second["learner"])


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_sigterm_to_one_process_ends_the_command(rank, tmp_path):
    process = torchrun(*SMALL, "--iterations", "100000", "--run-dir", str(tmp_path))
    for line in process.stdout:
        if "steps/s" in line:
            break
    os.kill(process_of(process.pid, rank), signal.SIGTERM)
    began = time.monotonic()
    out = finished(process)
    assert time.monotonic() - began < 60 and "Interrupted, after" in out
    (path,) = [path for path in tmp_path.glob("*model*") if path.suffix != ".png"]
    assert len(checkpoint.load(path)["others"]) == 1


def process_of(parent: int, rank: int) -> int:
    """The process id of the child of ``parent`` that has this rank."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                environment = (stat.parent / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environment:
                    return int(stat.parent.name)
        except (OSError, IndexError):
            continue
    raise AssertionError(f"no process of rank {rank}")
