"""The exported C header, by a main that the exporter did not write: numbers, self-test, contract, prefix, float16."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path

import c_policy
import pytest
import torch

from pydrone.cli.main import main
from pydrone.envs import make
from pydrone.envs.contract import channels, contract
from pydrone.envs.drone import DroneState
from pydrone.envs.hover_task import Constants, HoverConfig, observe
from pydrone.envs.record import Actions, Record
from pydrone.ppo import export
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.exporting import c_header, c_program
from pydrone.ppo.policy.actor_critic import ACTIVATIONS, ActorCritic
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
LIMITS = (-1.0, 1.0)


@pytest.fixture(autouse=True)
def compilers():
    c_policy.need_compilers()


def policy(hidden: tuple[int, ...] = (6, 5), obs: int = 17, actions: int = 4, **options: object) -> ActorCritic:
    torch.manual_seed(4)
    return ActorCritic(obs, actions, hidden, **options)


def precise(own: torch.nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """The policy's actions for independent observations, in double precision, clipped."""
    return copy.deepcopy(own).double().mean(obs.double()).detach().clamp(*LIMITS)


@pytest.mark.parametrize("hidden", [(128, 128), (32, 32, 32)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_actions_equal_the_policys_to_a_millionth(activation, hidden, tmp_path):
    own = policy(hidden, activation=activation)
    obs = torch.randn(200, 17)
    with torch.no_grad():
        own.actor[-1].weight.mul_(0.6 / own.mean(obs).std())
    most = own.mean(obs).detach().abs().quantile(0.9).item()
    path = export.save(own, tmp_path / "policy.h", "c", (-most, most)).path
    (actions,) = c_policy.act(path, obs)
    wanted = precise(own, obs).clamp(-most, most)
    torch.testing.assert_close(actions.double(), wanted, rtol=0, atol=1e-6)


def test_what_is_not_finite_is_not_hidden(tmp_path):
    path = export.save(policy(activation="relu"), tmp_path / "policy.h", "c", LIMITS).path
    obs = torch.zeros(2, 17)
    obs[1, 3] = float("nan")
    (actions,) = c_policy.act(path, obs)
    assert actions[0].isfinite().all() and actions[1].isnan().all()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_recurrent_policy_remembers(cell, tmp_path):
    """Its own struct and reset, over steps in one program."""
    torch.manual_seed(1)
    own = make_policy({"policy": 3}, 2, PPOConfig(recurrent=cell, rnn_dim=6, hidden_dims=(5,)), None)
    export.save(own, tmp_path / "policy.h", "c", LIMITS)
    source = """#include <stdio.h>
#include "policy.h"
int main(void)
{
  const float obs[3] = {0.5f, -1.0f, 2.0f};
  pydrone_memory memory;
  float actions[2];
  int flight, i;
  for (flight = 0; flight < 2; ++flight) {
    pydrone_reset(&memory);
    for (i = 0; i < 4; ++i) {
      pydrone_act(&memory, obs, actions);
      printf("%.9g %.9g\\n", (double)actions[0], (double)actions[1]);
    }
  }
  return 0;
}
"""
    (tmp_path / "flights.c").write_text(source)
    subprocess.run([*c_policy.COMPILERS["c"], "-o", "flights", "flights.c", "-lm"], cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "flights"], capture_output=True, text=True, check=True).stdout
    got = torch.tensor([[float(x) for x in line.split()] for line in said.splitlines()])
    own.reset()
    steps = [own.mode(torch.tensor([[0.5, -1.0, 2.0]])).detach().clamp(*LIMITS) for _ in range(4)]
    torch.testing.assert_close(got, torch.cat(steps * 2), rtol=0, atol=1e-6)
    assert not torch.equal(got[0], got[1])


# ---------------------------------------------------------------------------------------------------------- float16


def test_float16_weights_are_the_policys_rounded(tmp_path):
    own = policy(normalize_obs=True)
    own.observe(3 + 2 * torch.randn(20, 10, 17))
    with torch.no_grad():
        own.actor[0].weight[0] = torch.linspace(-6e-5, 6e-5, 17)  # subnormal in float16
        own.actor[0].weight[1] = torch.linspace(-2e-7, 2e-7, 17)
        own.actor[0].bias.fill_(1 / 3)
    done = export.save(own, tmp_path / "policy.h", "c", LIMITS, weights="float16")
    rounded = copy.deepcopy(own)
    for layer in rounded.actor:
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = layer.weight.data.half().float()
    obs = 3 + 2 * torch.randn(50, 17)
    (actions,) = c_policy.act(done.path, obs)
    torch.testing.assert_close(actions.double(), precise(rounded, obs), rtol=0, atol=1e-6)
    apart = (precise(rounded, obs) - precise(own, obs)).abs().max().item()
    assert apart > 1e-5
    said = float(re.search(r"on 64 random observations actions differ by up to (\S+) from", done.rounding)[1])
    assert 0.05 * apart < said < 20 * apart
    assert done.rounding in c_policy.metadata(done.path)["comment"]


def test_weights_beyond_float16_are_refused(tmp_path):
    own = policy()
    with torch.no_grad():
        own.actor[2].weight[0, 0] = 1e5
    with pytest.raises(export.ExportError, match=r"expected float32, since actor\.2\.weight has numbers beyond"):
        export.save(own, tmp_path / "policy.h", "c", LIMITS, weights="float16")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- checked before writing


def spoilt(name: str, old: str, new: str):
    text = c_header._FUNCTIONS[name]
    assert old in text
    return lambda patch: patch.setitem(c_header._FUNCTIONS, name, text.replace(old, new))


MISTAKES = {
    "no bias": (spoilt("linear", "b = bias[j + 1]", "b = bias[j]"), "its test vector 1"),
    "no clip": (
        spoilt("clip", "x > high ? high : x", "x > high + 9.0f ? high : x"),
        "its actions differ from the policy's own by up to",
    ),
    "only far from 0": (spoilt("elu", "expm1f(x)", "x < -8.0f ? x : expm1f(x)"), "its actions differ"),
    "digits": (lambda patch: patch.setattr(c_header, "_number", lambda x: f"{x:.3e}f"), "its test vector 1"),
    "no C": (spoilt("linear", "int i, j;", "int i, j"), "does not compile it: policy.h:"),
    "a warning": (spoilt("linear", "int i, j;", "int i, j, k;"), "does not compile it: policy.h:.* unused variable"),
    "no test": (
        lambda patch: patch.setattr(c_header, "SELF_TEST_TOLERANCE", -1.0),
        "its program ends with an error: its test vector 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_header_that_is_wrong_is_not_written(mistake, tmp_path, monkeypatch):
    (tmp_path / "policy.h").write_text("the one before")
    spoil, message = MISTAKES[mistake]
    spoil(monkeypatch)
    own = policy(activation="elu")
    with torch.no_grad():
        own.actor[0].weight.mul_(3)
        own.actor[0].bias.copy_(torch.linspace(-1, 1, 6))
        own.actor[-1].weight.mul_(2)
    with pytest.raises(export.ExportError, match=message):
        export.save(own, tmp_path / "policy.h", "c", LIMITS)
    assert [x.name for x in tmp_path.iterdir()] == ["policy.h"]
    assert (tmp_path / "policy.h").read_text() == "the one before"


def test_without_a_compiler_it_is_written_and_said(run_dir, monkeypatch, capsys):
    monkeypatch.setenv("CC", "a-compiler-that-is-nowhere")
    assert main(["export", str(run_dir), "--format", "c"]) == 0
    assert "Not checked: there is no C compiler (cc, gcc or clang; CC names another)" in capsys.readouterr().out
    assert c_policy.metadata(run_dir / "policy.h")["num_obs"] == "17"


def test_the_compiler_that_cc_names_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "gcc -O0")
    assert c_program.compiler() == ["gcc", "-O0"]
    assert export.save(policy(), tmp_path / "policy.h", "c", LIMITS).checked_with == "the C compiler gcc -O0"


@pytest.mark.parametrize("other", ["0.7f", "NAN"])
def test_the_self_test_sees_another_weight(other, tmp_path):
    path = export.save(policy(), tmp_path / "policy.h", "c", LIMITS).path
    program = c_policy.build(path, "c", tmp_path)
    c_policy.run(program, torch.zeros(1, 17))  # fails where the self-test does
    text = path.read_text()
    number = re.search(r"pydrone_weight_0\[\d+\] = \{\s+(-?[\d.]+f)", text)[1]
    path.write_text(text.replace(number, other, 1))
    with pytest.raises(AssertionError, match="status 4"):
        c_policy.run(c_policy.build(path, "c", tmp_path), torch.zeros(1, 17))


# ------------------------------------------------------------------------------------------ the contract, the command


def test_the_contract_names_what_observe_computes():
    """Names, units, frames and scales, in order, for constants that are not the defaults."""
    config = HoverConfig(pos_scale=0.5, lin_vel_scale=0.2, ang_vel_scale=0.1)
    record = Record.of(make("quadrotor", num_envs=1, pos_scale=0.5, lin_vel_scale=0.2, ang_vel_scale=0.1, dt=0.02))
    found = channels(record.constants)
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(30, n, generator=draw) for n in (3, 4, 3, 3, 3, 4)]
    pos, quat, vel, ang, target, last = parts
    state = DroneState(pos, quat, vel, ang)
    # What the names say.
    values = {f"target - position, {x}": target[:, i] - pos[:, i] for i, x in enumerate("xyz")}
    values |= {f"attitude, quaternion {x}": quat[:, i] for i, x in enumerate("wxyz")}
    values |= {f"velocity, {x}": vel[:, i] for i, x in enumerate("xyz")}
    values |= {f"angular velocity, {x}": ang[:, i] for i, x in enumerate("xyz")}
    values |= {f"actions[{i}] of the call before": last[:, i] for i in range(4)}
    row = torch.stack([(values[c.name] * c.scale).clamp(-c.limit, c.limit) for c in found], 1)
    torch.testing.assert_close(row, observe(state, target, last, Constants.of(config)))
    text, dt = contract(record, 17, 4, record.actions)
    assert dt == 0.02 and "a call every 0.02 s (50 Hz)" in text
    assert [line.split("  ")[1] for line in text.splitlines() if line.startswith("  obs[")] == [
        f"obs[{i}]" for i in range(17)
    ]
    assert "obs[7]   velocity, x: m/s, body frame, times 0.2, clipped to [-1, 1]" in text
    assert "obs[0]   target - position, x: m, world frame, times 0.5, clipped to [-1, 1]" in text
    assert "obs[12]  angular velocity, z: rad/s, body frame, times 0.1" in text
    assert "actions[1]  propeller rear right (x -0.028, y -0.028 m), turns clockwise" in text


def test_the_contract_of_another_environment_says_what_is_known():
    record = Record("mine", "mine", None, {})
    actions = Actions(((-2.0,), (2.0,)))
    text, dt = contract(record, 17, 4, actions, ("policy", "more"))
    assert dt is None and "as mine returns them, in its order, its groups policy, more one after the other" in text
    assert "Actions: 4, clipped to [-2, 2]." in text and "propeller" not in text


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "run"
    config = TrainConfig(env="quadrotor", num_steps=2, ppo=PPOConfig(hidden_dims=(5, 4), num_minibatches=1))
    Trainer(make("quadrotor", num_envs=2), config, folder, echo=lambda _: None).save()
    return folder


def test_the_command_writes_the_contract(run_dir, capsys):
    assert main(["export", str(run_dir), "--format", "c", "--prefix", "hover", "--weights", "float16"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"differ from the policy's with these weights by at most \d\.\de-0[789]\n", said), said
    assert "The weights are rounded to float16" in said
    text = (run_dir / "policy.h").read_text()
    for part in ("HOVER_STEP_MICROSECONDS 10000", "hover_act(", "hover_self_test(", "in quadrotor, iteration 0"):
        assert part in text
    assert "pydrone_" not in text
    comment = text.partition("*/")[0]
    assert "obs[16]  actions[3] of the call before" in comment and "(100 Hz)" in comment
    assert all(len(line) <= 120 for line in text.splitlines())
    c_policy.act(run_dir / "policy.h", torch.zeros(1, 17))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "c", "--prefix", "2d"], "prefix: expected a letter and then letters, digits and underscores"),
        (["--format", "c", "--prefix", "a-b"], "got 'a-b'"),
        (["--format", "torchscript", "--prefix", "x"], "--prefix and --weights float16: expected with --format c, got"),
        (["--format", "torchscript", "--weights", "float16"], "expected with --format c, got torchscript"),
    ],
)
def test_options_that_cannot_be_are_errors(options, message, run_dir, capsys):
    before = sorted(run_dir.iterdir())
    assert main(["export", str(run_dir), *options]) == 1
    assert message in capsys.readouterr().err
    assert sorted(run_dir.iterdir()) == before


def test_names_that_users_gave_do_not_end_the_comment(tmp_path):
    metadata = {"env": "a*/ int x; /* \u00e9 \\", "iteration": 1}
    path = export.save(policy(), tmp_path / "policy.h", "c", LIMITS, metadata).path
    c_policy.act(path, torch.zeros(1, 17))


def test_the_documents_lines_compile(run_dir, tmp_path):
    assert main(["export", str(run_dir), "--format", "c"]) == 0
    blocks = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        (run_dir / "main.c").write_text(block)
        program = tmp_path / f"program{number}"
        subprocess.run([*c_policy.COMPILERS["c"], "-o", program, "main.c", "-lm"], cwd=run_dir, check=True)
        assert subprocess.run([program], timeout=60).returncode == 0
