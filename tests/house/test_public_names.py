"""What users import, type and keep stays: names, commands, flags, and the files of earlier versions."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pydrone.cli import main as cli

# A run's folder as commit 7964951 wrote it: `pydrone train --env quadrotor --num-envs 4 --num-steps 8 --iterations 2
# --hidden-dims 8 8 --normalize-obs --num-minibatches 2 --no-tensorboard`.
EARLIER = Path(__file__).with_name("of_7964951")

NAMES = {
    "pydrone": "BufferFull Minibatch RolloutBuffer backends gae retrace vtrace __version__",
    "pydrone.buffer": "BufferFull Minibatch NonFinite RolloutBuffer",
    "pydrone.estimators": "gae retrace vtrace",
    "pydrone.memory": "MemoryPlan plan render",
    "pydrone.ppo": "clipped_step fused_update",
    "pydrone.ppo.config": "PPOConfig TrainConfig",
    "pydrone.ppo.trainer": "CHECKPOINT_KEYS NotFinite Outcome Trainer nothing_to_do progress_line read_checkpoint",
    "pydrone.ppo.distributed": "ALONE Ranks",
    "pydrone.envs": "ENVIRONMENTS Env EpisodeStats LogMeter Randomization StepResult TaskOptions check_name known make",
    "pydrone.envs.adapters": "GymnasiumEnv",
    "pydrone.envs.genesis_hover": "GenesisHover",
    "pydrone.envs.quadrotor": "Quadrotor QuadrotorCourse",
    "pydrone.integrations.rsl_rl": "PPO RolloutStorage patch unpatch",
    "pydrone.integrations.rsl_rl_env": "VecEnvWrapper",
    "pydrone.integrations.skrl": "RandomMemory patch unpatch",
    "pydrone.integrations.sb3": "DictRolloutBuffer PPO RolloutBuffer",
    "pydrone.integrations.torchrl": "GAE",
    "pydrone.integrations.rl_games": "patch unpatch",
    "pydrone.integrations.pufferlib": "compute_puff_advantage patch unpatch",
}

FLAGS = {
    "train": """
        activation actor-obs advantage-scope att-noise autocast burn-in capture chunk-size clip clip-param
        clipped-value-loss config critic-obs desired-kl device entropy-coef env gamma gyro-noise hidden-dims
        hold inertia init-std iterations lam latency learner learning-rate live lr mass matmul max-grad-norm
        max-iterations max-kl motor-lag near-decay no-autocast no-capture no-clipped-value-loss no-live
        no-normalize-advantages no-normalize-obs no-normalize-rewards no-normalize-values
        no-random-episode-starts no-resample-targets no-tensorboard no-wandb normalize-advantages
        normalize-obs normalize-rewards normalize-values num-envs num-epochs num-learning-epochs
        num-mini-batches num-minibatches num-steps num-steps-per-env obs-clip obs-dtype pos-noise
        random-episode-starts recurrent resample-targets resume reward-scale rnn-dim run-dir save-interval
        schedule seed target-episode-length tensorboard thrust value-loss-coef vel-noise wandb wandb-project
        weight-near wind
    """,
    "eval": "device env episodes out randomize seed steps targets video within",
    "plot": "figure out x",
    "doctor": "json no-speed",
    "export": "clip format out prefix weights",
    "memory": """
        capacity field iterations max-episode-length max-iterations num-actions num-envs num-obs num-steps
        num-steps-per-env obs-dtype reused-minibatch
    """,
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module):
    peer = module.rpartition(".")[2]
    peer = {"rsl_rl_env": "rsl_rl", "sb3": "stable_baselines3"}.get(peer, peer)
    if module.startswith("pydrone.integrations."):
        pytest.importorskip(peer)
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert not missing


@pytest.mark.parametrize("command", FLAGS)
def test_commands_and_their_flags(command, monkeypatch):
    pytest.importorskip("tyro")
    monkeypatch.setenv("COLUMNS", "300")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    flags = set(re.findall(r"--([a-z0-9-]+)", shown.getvalue()))
    assert not set(FLAGS[command].split()) - flags


def test_every_command_is_listed_here():
    assert FLAGS.keys() == cli.COMMANDS.keys()


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "pydrone", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("pydrone ")


def test_a_checkpoint_of_an_earlier_version_is_resumed_and_flown(tmp_path, monkeypatch, capsys):
    for module in ("tyro", "matplotlib"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    run = ["--run-dir", "resumed", "--device", "cpu", "--no-tensorboard"]
    assert cli.main(["train", "--resume", str(EARLIER / "model_2.pt"), "--iterations", "3", *run]) == 0
    said = capsys.readouterr().out
    assert "3/3  reward" in said and "begin anew" not in said
    assert cli.main(["eval", str(EARLIER / "model_2.pt"), "--episodes", "2", "--steps", "5", "--out", "flown"]) == 0
    assert cli.main(["train", "--config", str(EARLIER / "config.toml"), "--iterations", "1", *run[2:]]) == 0
