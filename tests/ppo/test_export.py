"""Exported policies: the contents of the files, the check before writing, and the documented code that runs them."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import c_policy
import numpy as np
import pytest
import torch
from torch import nn

from pydrone.cli.main import main
from pydrone.envs import make
from pydrone.envs.record import Actions, Record
from pydrone.ppo import export
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
LIMITS = (-1.0, 1.0)
FORMATS = list(export.FORMATS)


@pytest.fixture(params=FORMATS)
def format(request) -> str:
    for name in export.NEEDS[request.param]:
        pytest.importorskip(name)
    if request.param == "c":
        c_policy.need_compilers()
    return request.param


# The ONNX exporter takes a second per policy.
LIBRARIES = [pytest.param("onnx", marks=pytest.mark.slow), "torchscript", "safetensors"]
WITHOUT_ONNX = [*LIBRARIES, "c"]


def policy(obs: object = 3, actions: int = 2, hidden: tuple[int, ...] = (5, 4), **options: object) -> ActorCritic:
    """A policy whose actions are clipped for some observations and not for others."""
    torch.manual_seed(3)
    made = ActorCritic(obs, actions, hidden, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made


def act(path: Path, format: str, obs: torch.Tensor, *memory: torch.Tensor) -> list[torch.Tensor]:
    """The file's contents, read with its format's own library."""
    if format == "torchscript":
        outputs = torch.jit.load(str(path))(obs, *memory)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    if format == "onnx":
        from onnx.reference import ReferenceEvaluator

        given = dict(zip(("obs", "memory"), (x.numpy() for x in (obs, *memory))))
        return [torch.as_tensor(x) for x in ReferenceEvaluator(str(path)).run(None, given)]
    if format == "c":
        return c_policy.act(path, obs, *memory)
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        layers = json.loads(file.metadata()["layers"])
        outputs = export.run(layers, {name: file.get_tensor(name) for name in file.keys()}, obs, *memory)  # noqa: SIM118
    return [x for x in outputs if x is not None]


def metadata(path: Path, format: str) -> dict[str, str]:
    if format == "torchscript":
        files = {"pydrone.json": ""}
        torch.jit.load(str(path), _extra_files=files)
        return json.loads(files["pydrone.json"])
    if format == "onnx":
        import onnx

        return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    if format == "c":
        return c_policy.metadata(path)
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return file.metadata()


@pytest.fixture
def by_hand() -> ActorCritic:
    """Actions 2 tanh(obs[0] - obs[1]) and 0.25, with one hidden unit."""
    made = ActorCritic(2, 2, (1,))
    with torch.no_grad():
        made.actor[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
        made.actor[0].bias.zero_()
        made.actor[2].weight.copy_(torch.tensor([[2.0], [0.0]]))
        made.actor[2].bias.copy_(torch.tensor([0.0, 0.25]))
    return made


def test_a_policy_worked_out_by_hand(by_hand, format, tmp_path):
    # tanh(ln 2) = (2 - 1/2) / (2 + 1/2) = 0.6, and tanh(ln 2 / 2) = (sqrt 2 - sqrt 1/2) / (sqrt 2 + sqrt 1/2) = 1/3
    ln2 = 0.6931472
    obs = torch.tensor([[ln2 + 1, 1.0], [0.0, ln2 / 2], [5.0, 5.0]])
    for limits, expected in ((LIMITS, [1.0, -2 / 3, 0.0]), (None, [1.2, -2 / 3, 0.0]), ((-0.5, 1.1), [1.1, -0.5, 0.0])):
        done = export.save(by_hand, tmp_path / "policy", format, limits)
        assert (done.num_obs, done.num_actions, done.memory) == (2, 2, 0)
        (actions,) = act(done.path, format, obs)
        torch.testing.assert_close(actions, torch.tensor([[x, 0.25] for x in expected]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", WITHOUT_ONNX, indirect=True)
@pytest.mark.parametrize("hidden", [(), (5,), (6, 5, 4)])
def test_the_files_actions_are_the_policys(hidden, format, tmp_path):
    own = policy({"policy": 3, "critic": 7}, 2, hidden)
    path = export.save(own, tmp_path / "policy", format, LIMITS).path
    for batch in (1, 2, 33):
        obs = 3 * torch.randn(batch, 3)
        wanted = own.mean({"policy": obs}).clamp(-1, 1).detach()
        torch.testing.assert_close(act(path, format, obs)[0], wanted, rtol=0, atol=1e-6)
        if batch == 33:
            clipped = (wanted.abs() == 1).float().mean()
            assert 0.05 < clipped < 0.95, "some actions are clipped and some are not, or this tests nothing"
    # The critic is not exported.
    assert all(x.shape[-1] != 7 for x in export.describe(own)[1].values())


def test_what_is_written_down(by_hand, format, tmp_path):
    done = export.save(by_hand, tmp_path / "policy", format, LIMITS, {"env": "quadrotor", "iteration": 7})
    found = metadata(done.path, format)
    expected = {"num_obs": "2", "num_actions": "2", "memory": "0", "iteration": "7"}
    assert expected.items() <= found.items() and found["env"] == "quadrotor"
    if format == "c":  # whose layers are code
        return
    assert found["format"] == "pydrone-policy-1"
    assert json.loads(found["layers"]) == [
        ["linear", "weight_0", "bias_0"],
        ["tanh"],
        ["linear", "weight_2", "bias_2"],
        ["clip", -1.0, 1.0],
    ]


# --------------------------------------------------------------------------------------------------- other policies


def variant(**options: object) -> nn.Module:
    """A policy with these options and an updated normaliser, for three observation groups and two actions."""
    torch.manual_seed(1)
    discrete = options.pop("discrete", None)
    actions = 2 if discrete is None else ((), torch.int64)
    made = make_policy({"policy": 3, "more": 2, "critic": 6}, actions, PPOConfig(**options), discrete)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    groups = {name: 2 + 3 * torch.randn(50, 4, width) for name, width in made.obs.items()}
    made.observe(groups)
    return made


VARIANTS = {
    "normalize_obs": {"normalize_obs": True, "obs_clip": 1.5},
    "groups": {"normalize_obs": True, "actor_obs": ("more", "policy"), "critic_obs": ("critic", "more")},
    "half precision": {"obs_dtype": "bfloat16", "autocast": True},
    "values": {"normalize_values": True},
    "discrete": {"discrete": 4, "normalize_obs": True},
    "gru": {"recurrent": "gru", "rnn_dim": 6, "normalize_obs": True},
    "lstm": {"recurrent": "lstm", "rnn_dim": 6},
    "discrete gru": {"recurrent": "gru", "rnn_dim": 6, "discrete": 3},
}


@pytest.mark.parametrize("format", WITHOUT_ONNX, indirect=True)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_policy(options, format, tmp_path):
    check_variant(options, format, tmp_path)


@pytest.mark.parametrize("format", WITHOUT_ONNX, indirect=True)
def test_several_choices(format, tmp_path):
    options = {"discrete": (3, 4)}
    if format != "c":
        check_variant(options, format, tmp_path)
        return
    with pytest.raises(export.ExportError, match="policy: expected one choice an action for a C header, got 2"):
        check_variant(options, format, tmp_path)
    assert not list(tmp_path.glob("policy*"))


def test_a_recurrent_policy_with_a_normaliser_as_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    check_variant(VARIANTS["gru"], "onnx", tmp_path)


def check_variant(options: dict, format: str, tmp_path: Path) -> None:
    own = variant(**options)
    # Through a checkpoint, as the command does.
    config = TrainConfig(ppo=PPOConfig(**{name: x for name, x in options.items() if name != "discrete"}))
    state = {"policy": own.state_dict(), "config": dataclasses.asdict(config)}
    done = export.save(export.policy_of(state), tmp_path / "policy", format, LIMITS)
    own.matmul, own.obs_dtype = "float32", torch.float32
    discrete = "discrete" in options
    memory = [torch.zeros(9, done.memory)] if done.memory else []
    assert bool(memory) == own.recurrent and done.num_obs == (5 if "actor_obs" in options else 3)
    actions = set()
    for _ in range(4):
        groups = {name: 2 + 3 * torch.randn(9, width) for name, width in own.obs.items()}
        obs = torch.cat([groups[name] for name in own.actor_obs], -1)
        got, *memory = act(done.path, format, obs, *memory)
        wanted = own.mode(groups).detach()  # advances a recurrent policy's own memory
        wanted = wanted if discrete else wanted.clamp(-1, 1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0 if discrete else 2e-6)
        actions |= set(got.flatten().tolist())
    assert len(actions) > (1 if discrete else 8)


@pytest.mark.parametrize(("kind", "cell"), [(nn.GRU, "gru"), (nn.LSTM, "lstm")])
def test_cells_equal_torchs_and_the_documented_ones(kind, cell):
    rnn = kind(3, 4)
    weights = [x.detach() for x in rnn.parameters()]
    names = {}
    exec(next(x for x in blocks("export.md") if "def gru" in x), names)
    memory, x = torch.zeros(5, 4 if cell == "gru" else 8), torch.randn(6, 5, 3)
    other = memory
    for step, wanted in zip(x, rnn(x)[0].detach()):
        got, memory = export.CELLS[cell](step, memory, *weights)
        documents, other = names[cell](step, other, *weights)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(documents, wanted)
        torch.testing.assert_close(other, memory)


# ------------------------------------------------------------------------------------------ checked before writing

# Operation: what a mistake in its export would do.
MISTAKES = {
    "linear": lambda x, weight, bias: nn.functional.linear(x, weight),
    "tanh": lambda x: x.clamp(-1, 1),
    "clip": lambda x, low, high: x,
}


@pytest.mark.parametrize("format", LIBRARIES, indirect=True)
@pytest.mark.parametrize("operation", MISTAKES)
def test_a_file_that_differs_is_not_written(operation, format, tmp_path, monkeypatch):
    path = tmp_path / "policy"
    path.write_text("the one before")
    monkeypatch.setitem(export.OPERATIONS, operation, MISTAKES[operation])
    with pytest.raises(export.ExportError, match=r"policy: not written: its actions differ .* by up to \d"):
        export.save(policy(), path, format, LIMITS)
    assert [x.name for x in tmp_path.iterdir()] == ["policy"] and path.read_text() == "the one before"


def test_differences_at_the_edges_are_seen(tmp_path, monkeypatch):
    """A tanh that is right only for small arguments is refused."""
    monkeypatch.setitem(export.OPERATIONS, "tanh", lambda x: torch.where(x.abs() > 50, -x.tanh(), x.tanh()))
    with pytest.raises(export.ExportError):
        export.save(policy(), tmp_path / "policy", "torchscript", LIMITS)


def test_weights_that_are_not_finite_are_not_written(format, tmp_path):
    own = policy()
    with torch.no_grad():
        own.actor[0].bias[1] = float("nan")
    with pytest.raises(export.ExportError, match=r"expected finite weights, got actor\.0\.bias"):
        export.save(own, tmp_path / "policy", format, LIMITS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", WITHOUT_ONNX, indirect=True)
def test_a_full_disk_keeps_the_previous_file(format, tmp_path, monkeypatch):
    path = export.save(policy(), tmp_path / "policy", format, LIMITS).path
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export.save(policy(hidden=(7,)), path, format, LIMITS)
    assert [x.name for x in tmp_path.iterdir()] == ["policy"] and path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pickle"}, "format: expected one of onnx, torchscript, safetensors, c, got 'pickle'"),
        ({"limits": (1.0, -1.0)}, r"limits: expected a lower and a higher number, got \(1.0, -1.0\)"),
        ({"path": "."}, r"expected a file's name in a folder that is there"),
        ({"path": "nowhere/policy"}, r"nowhere/policy: expected a file's name in a folder that is there"),
    ],
)
def test_impossible_exports_are_errors(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        export.save(policy(), **{"path": "policy", "format": "torchscript", "limits": LIMITS} | change)


def test_without_onnxruntime_onnx_itself_checks(tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export.save(policy(), tmp_path / "policy", "onnx", LIMITS).checked_with == "onnx's reference evaluator"


# -------------------------------------------------------------------------------- what the environment makes of actions

INF = float("inf")
# Kind of environment: its action space, how it bounds actions, what the actor says, what the environment then gets.
OWN = {
    "clip": (([-2, -2, 0, -INF], [2, 2, INF, 3]), "clip", [1.555, -3, -1, 7], [1.555, -2, 0, 3]),
    # -1 to 1 onto -2 to 2, 0 to 10, -4 to -2 and 100 to 101: a step of 0.5 is 1, 2.5, 0.5 and 0.25.
    "rescale": (([-2, 0, -4, 100], [2, 10, -2, 101]), "rescale", [1.0, 0.5, -7, -0.5], [2, 7.5, -4, 100.25]),
    "none": (([-1, -1], [1, 1]), "none", [1.555, -3], [1.555, -3]),
    "unbounded": (([-INF], [INF]), "clip", [1.555], [1.555]),
    "integers": (([-5, 0], [5, 9], "int32"), "clip", [-1.555, 12.3], [-1, 9]),
    "rescaled integers": (([0, -9], [255, 9], "int16"), "rescale", [0.0, -0.5], [127, -4]),  # 127.5, -4.5
    "discrete": (5, "clip", [0.0, 2.0, 1.0], 6),  # the second of three that begin at 5
}


def own_environment(space: object, bounded: str):
    gym = pytest.importorskip("gymnasium")
    vector = pytest.importorskip("gymnasium.vector")
    from pydrone.envs.adapters import GymnasiumEnv

    class Single(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gym.spaces.Discrete(3, start=space) if isinstance(space, int) else None

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 1.0, False, False, {}

    if not isinstance(space, int):
        low, high, dtype = (*space, "float32")[:3]
        Single.action_space = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    return GymnasiumEnv(vector.SyncVectorEnv([Single] * 2), bounded_actions=bounded)


# The ONNX exporter takes a second or two.
QUICK = [(format, kind) for format in FORMATS for kind in OWN if format != "onnx" or kind in ("clip", "rescale")]
SLOW = [pytest.param("onnx", kind, marks=pytest.mark.slow) for kind in OWN if ("onnx", kind) not in QUICK]


@pytest.mark.parametrize(("format", "kind"), QUICK + SLOW, indirect=["format"])
def test_the_exported_actions_are_those_that_the_environment_gets(kind, format, tmp_path, capsys):
    """Worked out by hand, and by the environment itself; the run is recorded, exported and checked by the command."""
    space, bounded, said, expected = OWN[kind]
    env = own_environment(space, bounded)
    config = TrainConfig(num_steps=2, ppo=PPOConfig(hidden_dims=(3,), num_minibatches=1))
    trainer = Trainer(env, config, tmp_path, echo=lambda _: None)
    with torch.no_grad():
        trainer.policy.actor[2].weight.zero_()
        trainer.policy.actor[2].bias.copy_(torch.tensor(said))
    trainer.save()
    assert main(["export", str(tmp_path), "--format", format]) == 0
    path = tmp_path / f"policy{export.FORMATS[format]}"
    (actions,) = act(path, format, torch.randn(2, 2))
    np.testing.assert_allclose(actions.numpy(), [expected] * 2, rtol=1e-6)
    taken = env._actions(trainer.policy.mode(torch.zeros(2, 2)).detach())
    np.testing.assert_allclose(actions.numpy(), taken, rtol=1e-6)
    found = metadata(path, format)
    assert "genesis" not in str(found) and found["env"].endswith("GymnasiumEnv")
    if format != "c":
        json.loads(found["layers"], parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert str(Actions.of(env)) in capsys.readouterr().out


@pytest.mark.parametrize("mistake", ["limits", "onto"])
def test_the_check_sees_bounds_that_the_file_has_not(mistake, tmp_path, monkeypatch):
    """The layers and the check compute the environment's bounds in two ways."""
    actions = Actions(((-1.0,), (1.0,)), ((-2.0, -1.0), (2.0, 1.0)))
    real = export.describe
    monkeypatch.setattr(export, "describe", lambda own, given: real(own, given._replace(**{mistake: None})))
    if mistake == "limits":
        actions = actions._replace(onto=None)
    with pytest.raises(export.ExportError, match="its actions differ from the policy's own"):
        export.save(policy(), tmp_path / "policy", "torchscript", actions)


def test_a_wrapper_does_not_borrow_the_bounds_of_what_it_wraps(tmp_path, capsys):
    """It halves the actions, and passes every attribute on."""

    class Halved:
        def __init__(self, env):
            self.env = env

        def __getattr__(self, name):
            return getattr(self.env, name)

        def step(self, actions):
            return self.env.step(actions / 2)

    config = TrainConfig(env="quadrotor", num_steps=2, ppo=PPOConfig(hidden_dims=(3,)))
    Trainer(Halved(make("quadrotor", num_envs=2)), config, tmp_path, echo=lambda _: None).save()
    assert main(["export", str(tmp_path), "--format", "torchscript"]) == 0
    assert "not clipped (the environment has no action_limits" in capsys.readouterr().out
    assert Record.read(checkpoint.load(tmp_path / "model_0.pt")).name is None


def test_a_run_of_before_exports_as_its_environment_clips_where_it_fits_that_one(run_dir, tmp_path, capsys):
    """Then it said genesis-hover of every environment object."""
    state = checkpoint.load(run_dir / "model_10.pt")
    assert "environment" not in state
    assert main(["export", str(run_dir), "--format", "torchscript"]) == 0
    assert "actions, clipped to [-1, 1]; from" in capsys.readouterr().out
    state["policy"] = ActorCritic(3, 1, (8, 6)).state_dict()
    path = checkpoint.save(tmp_path / "model_1.pt", state)
    assert main(["export", str(path), "--format", "torchscript"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"pydrone: {path}: trained in another environment than quadrotor, which has 17 observations")
    assert main(["export", str(path), "--format", "torchscript", "--clip", "-2", "2"]) == 0
    assert "clipped to [-2, 2]" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- limits, the command line


@pytest.mark.parametrize("name", ["quadrotor", "genesis-hover"])
def test_limits_are_the_environments(name):
    assert export.action_limits(name) == (-1.0, 1.0)
    assert export.action_limits("of-another-package") is None


def test_the_quadrotor_clips_to_what_it_says():
    from pydrone.envs import make

    low, high = export.action_limits("quadrotor")
    observations = []
    for factor in (1.0, 3.0):
        env = make("quadrotor", num_envs=2, seed=0)
        env.reset()
        actions = torch.tensor([[low, high, high, low], [high, high, low, low]])
        observations.append(env.step(factor * actions).obs.clone())
    assert torch.equal(*observations)
    env.reset()
    assert not torch.equal(env.step(0.9 * actions).obs, observations[0]), "the limits are no tighter than they must be"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run's folder with two checkpoints in the quadrotor's sizes; the later one has different actions."""
    folder = tmp_path / "run"
    for iteration in (9, 10):
        torch.manual_seed(iteration)
        config = TrainConfig(env="quadrotor", ppo=PPOConfig(hidden_dims=(8, 6)))
        own = ActorCritic(17, 4, (8, 6))
        state = {
            "iteration": iteration,
            "policy": own.state_dict(),
            "learner": {},
            "config": dataclasses.asdict(config),
        }
        checkpoint.save(folder / f"model_{iteration}.pt", state)
    return folder


def test_the_command(run_dir, format, capsys):
    assert main(["export", str(run_dir), "--format", format]) == 0
    said = capsys.readouterr().out
    path = run_dir / f"policy{export.FORMATS[format]}"
    assert said.startswith(f"{path}: 17 observations to 4 actions, clipped to [-1, 1]; from iteration 10 of {run_dir}")
    assert re.search(
        r"Checked with .+ on \d+ inputs: actions differ from the policy's by at most \d\.\de-?\+?\d+", said
    )
    found = metadata(path, format)
    assert found["env"] == "quadrotor" and found["iteration"] == "10"
    torch.manual_seed(10)
    obs = 2 * torch.randn(5, 17)
    torch.manual_seed(10)
    wanted = ActorCritic(17, 4, (8, 6)).mean(obs).clamp(-1, 1).detach()
    torch.testing.assert_close(act(path, format, obs)[0], wanted, rtol=0, atol=1e-6)


def test_options_for_checkpoint_file_and_limits(run_dir, tmp_path, capsys):
    out = tmp_path / "drone.ts"
    arguments = ["--format", "torchscript", "--out", str(out), "--clip", "-0.1", "0.05"]
    assert main(["export", str(run_dir / "model_9.pt"), *arguments]) == 0
    assert "clipped to [-0.1, 0.05]; from iteration 9" in capsys.readouterr().out
    actions = torch.jit.load(str(out))(30 * torch.randn(50, 17))
    torch.testing.assert_close(torch.stack(actions.aminmax()), torch.tensor([-0.1, 0.05]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("nowhere", "nowhere: no such run folder or checkpoint"),
        (".", ".: no checkpoint model_ITERATION.pt in this folder that can be loaded"),
        ("notes.txt", "notes.txt: expected a checkpoint, got a file that PyTorch cannot read"),
        ("other.pt", "other.pt: expected the weights of a policy, got others: KeyError 'actor.0.weight'"),
    ],
)
def test_an_invalid_run_is_one_sentence(run, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("notes")
    config = dataclasses.asdict(TrainConfig())
    checkpoint.save("other.pt", {"iteration": 1, "policy": {"x": torch.ones(1)}, "learner": {}, "config": config})
    assert main(["export", run, "--format", "torchscript"]) == 1
    assert capsys.readouterr().err == f"pydrone: {message}\n"


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_what_is_not_installed_is_named(format, package, run_dir, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    assert main(["export", str(run_dir), "--format", format]) == 1
    assert f'{package} not installed; `pip install "pydrone-rl[export]"`' in capsys.readouterr().err
    assert not list(run_dir.glob("policy.*"))


# ------------------------------------------------------------------------------------------------------- the documents


def blocks(name: str) -> list[str]:
    path = ROOT / "README.md" if name == "README.md" else ROOT / "docs" / name
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


DOCUMENTED = [
    pytest.param(format, block, id=f"{name}-{format}")
    for name in ("README.md", "export.md")
    for block in blocks(name)
    for format, suffix in export.FORMATS.items()
    if f'"policy{suffix}"' in block
]


def test_every_format_is_documented():
    assert {parameter.values[0] for parameter in DOCUMENTED} == set(FORMATS) - {"c"}
    # test_export_c.py compiles these.
    assert "```c\n" in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("format", "block"), DOCUMENTED)
def test_the_documents_lines_run_the_file_without_pydrone(format, block, run_dir, tmp_path):
    for name in (*export.NEEDS[format], *(["onnxruntime"] if format == "onnx" else [])):
        pytest.importorskip(name)
    done = export.save(ActorCritic(17, 4, (8, 6)), run_dir / f"policy{export.FORMATS[format]}", format, LIMITS)
    obs = 2 * torch.randn(5, 17)
    np.save(run_dir / "obs.npy", obs.numpy())
    own = "torch.from_numpy(np.load('obs.npy'))" if format == "torchscript" else "np.load('obs.npy')"
    call = "actions = act(obs)" if "def act" in block else ""
    block = re.sub(r"(np|torch)\.zeros\([^=\n]*?\)(?=[\n)])", own, block)
    script = (
        "import sys; sys.modules['pydrone'] = None\nimport numpy as np\nobs = np.load('obs.npy')\n"
        f"{block}\n{call}\nnp.save('actions.npy', actions)\n"
    )
    (run_dir / "script.py").write_text(script)
    ran = subprocess.run([sys.executable, "script.py"], cwd=run_dir, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = torch.from_numpy(np.load(run_dir / "actions.npy"))
    torch.testing.assert_close(found, act(done.path, format, obs)[0], rtol=0, atol=1e-6)


def test_the_documented_code_has_at_most_ten_lines():
    (lines,) = [x for x in blocks("export.md") if "policy.safetensors" in x]
    assert len(lines.splitlines()) <= 10 and max(map(len, lines.splitlines())) <= 120
    assert isinstance(compile(lines, "lines", "exec"), types.CodeType)
