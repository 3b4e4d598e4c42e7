"""What may go wrong in a training: odd environments, numbers that are not finite, interrupts, failures, resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pydrone
from pydrone.envs.adapters import GymnasiumEnv, RslRlEnv
from pydrone.envs.base import StepResult
from pydrone.envs.quadrotor import Quadrotor
from pydrone.ppo.config import ON_RESUME, PPOConfig, TrainConfig
from pydrone.ppo.trainer import NotFinite, Trainer
from pydrone.ppo.training import checkpoint

N, T = 4, 6


class Clock:
    """Counts its steps in obs [N, 3]; ``truncate(t)`` says which environments time out in step t = 1, 2, ..."""

    num_envs, obs, actions, max_episode_length, autoreset = N, 3, 2, None, "same_step"
    device = torch.device("cpu")

    def __init__(self, truncate=lambda t: [False] * N, final_obs=True, log=False) -> None:
        self.truncate, self.final, self.log, self.t = truncate, final_obs, log, 0

    def _obs(self):
        return torch.full((N, 3), float(self.t % 7))

    def reset(self):
        return self._obs()

    def randomize_episode_lengths(self) -> None:
        pass

    def step(self, actions):
        self.t += 1
        ends = torch.tensor(self.truncate(self.t))
        log = {"speed": torch.tensor(float(self.t))} if self.log else {}
        return StepResult(self._obs(), torch.ones(N), ends, ends, self._obs() if self.final else None, None, log)

    def close(self) -> None:
        pass


class Groups(Clock):
    """The same with groups, as (shape, dtype)."""

    obs = {"policy": ((3,), torch.float32), "critic": ((5,), torch.float32)}

    def _obs(self):
        return {"policy": torch.full((N, 3), self.t % 7 / 7), "critic": torch.full((N, 5), self.t % 5 / 5)}


def config(**kwargs) -> TrainConfig:
    ppo = {"hidden_dims": (16, 16), "num_minibatches": 2, "num_epochs": 2, **kwargs.pop("ppo", {})}
    return TrainConfig(**{"num_steps": T, "iterations": 3, "tensorboard": False, **kwargs}, ppo=PPOConfig(**ppo))


def trainer(env, run_dir=None, echo=lambda _: None, **kwargs) -> Trainer:
    return Trainer(env, config(**kwargs), run_dir, echo=echo)


class VecEnv:
    """An rsl_rl.env.VecEnv in the least; time-outs every third step, of which no final observation is known."""

    num_envs, num_actions, device, max_episode_length = N, 2, "cpu", 3

    def __init__(self) -> None:
        self.t, self.episode_length_buf = 0, torch.zeros(N, dtype=torch.int64)

    def get_observations(self):
        return {"policy": torch.full((N, 3), self.t / 10), "critic": torch.full((N, 5), self.t / 10)}

    def step(self, actions):
        self.t += 1
        ends = torch.full((N,), self.t % 3 == 0)
        return self.get_observations(), torch.ones(N), ends.long(), {"time_outs": ends}


def gymnasium_dict(mode: str) -> GymnasiumEnv:
    gym = pytest.importorskip("gymnasium")
    vector = pytest.importorskip("gymnasium.vector")
    import numpy as np

    class Single(gym.Env):
        observation_space = gym.spaces.Dict(
            {name: gym.spaces.Box(-1, 1, (size,), np.float32) for name, size in (("policy", 3), ("critic", 5))}
        )
        action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return self.observation_space.sample(), {}

        def step(self, action):
            self.t += 1
            return self.observation_space.sample(), 1.0, False, self.t == 2, {}

    return GymnasiumEnv(vector.SyncVectorEnv([Single] * N, autoreset_mode=vector.AutoresetMode[mode]))


@pytest.mark.parametrize("kind", ["groups", "rsl_rl", "SAME_STEP", "NEXT_STEP"])
def test_observations_by_group_are_trained_on(kind):
    if kind == "groups":
        env = Groups(lambda t: [t % 4 == 0] * N)
    else:
        env = RslRlEnv(VecEnv()) if kind == "rsl_rl" else gymnasium_dict(kind)
    trained = trainer(env)
    assert trained.policy.actor[0].weight.shape == (16, 3) and trained.policy.critic[0].weight.shape == (16, 5)
    before = trained.policy.critic[0].weight.clone()
    for _ in range(2):
        figures = trained.iterate()
    assert math.isfinite(figures["value_loss"]) and figures["episodes"] > 0
    assert not torch.equal(before, trained.policy.critic[0].weight)


def test_time_outs_without_final_observations():
    env = Clock(lambda t: [t == 2, False, t == 4, False], final_obs=False)
    trained = trainer(env)
    assert trained.iterate()["episodes"] == 2
    assert trained.iterate()["iteration"] == 2


def test_every_step_may_time_out_where_no_limit_is_known():
    """N time-outs in each of T steps: a pool of N rows, the buffer's default, would overflow."""
    trained = trainer(Clock(lambda t: [True] * N))
    for _ in range(2):
        assert trained.iterate()["episodes"] == N * T


class CountReads(TorchDispatchMode):
    """Counts what makes a host wait for a device: ``reads``, by where it shows.

    item(), int(), float() and bool() of a tensor are all a _local_scalar_dense to the dispatcher, and shapes that
    depend on data are a nonzero or masked_select; tolist(), cpu() and numpy() of a CPU tensor dispatch nothing and are
    patched. ``.to("cpu")`` is not seen on the CPU, nor what a kernel reads by itself.
    """

    OPS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.reads: list[str] = []
        for name in ("tolist", "cpu", "numpy"):
            read = getattr(Tensor, name)
            monkeypatch.setattr(Tensor, name, lambda x, *args, n=name, f=read: (self.reads.append(n), f(x, *args))[1])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in self.OPS:
            self.reads.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason="the reference backend reads what kernels do not")
@pytest.mark.parametrize("log", [False, True])
def test_the_host_reads_once_an_iteration(log, monkeypatch):
    """Figures, flags and the environment's log, where it has one, in one read."""
    trained = trainer(Clock(lambda t: [t % 4 == 0] * N, final_obs=False, log=log))
    trained.iterate()
    # On the CPU the fused Adam itself reads the learning rate, which costs nothing there.
    trained.learner.optimizer.step = lambda: None
    with CountReads(monkeypatch) as count:
        trained.iterate()
    assert count.reads == ["tolist"]
    with count:
        assert torch.ones(1).bool().any() and torch.ones(1).item() == 1
    assert len(count.reads) == 3, "the counter sees nothing"


class Broken(Clock):
    """From step ``since`` on, what ``what`` names is NaN."""

    def __init__(self, what: str, since: int = T + 1) -> None:
        super().__init__()
        self.what, self.since = what, since

    def step(self, actions):
        result = super().step(actions)
        if self.t < self.since:
            return result
        return result._replace(**{self.what: torch.full_like(getattr(result, self.what), math.nan)})


@pytest.mark.parametrize(
    ("what", "culprit"), [("rewards", "rewards of the environment"), ("obs", "observations of the environment")]
)
def test_what_is_not_finite_is_named_and_its_iteration_is_logged(what, culprit, tmp_path):
    lines = []
    with pytest.raises(NotFinite, match=f"iteration 2: the loss is not finite .*: the {culprit} are not finite"):
        trainer(Broken(what), tmp_path, lines.append).train()
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert sum("steps/s" in line for line in lines) == 2
    assert not list(tmp_path.glob("model_*.pt")), "nothing is worth keeping"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_the_first_that_is_not_finite_is_the_culprit(number):
    """With its field, environment and step; an observation ends a training that would clip it, too."""

    class Crash(Clock):
        def step(self, actions):
            result = super().step(actions)
            result.obs[2, 0] = number if self.t == 2 else result.obs[2, 0]
            return result

    text = r"the observations of the environment are not finite: obs: 1 value .* environment 2 at step 2"
    with pytest.raises(NotFinite, match=text):
        trainer(Crash()).iterate()
    with pytest.raises(FloatingPointError, match=rf"^the rollout before the first iteration: {text}"):
        trainer(Crash(), ppo={"normalize_obs": True, "obs_clip": 5.0}).iterate()


def test_a_policy_that_diverged_is_not_a_crash():
    """Values are not finite before any reward is."""
    trained = trainer(Clock())
    trained.iterate()
    with torch.no_grad():
        next(iter(trained.policy.critic.parameters())).fill_(math.nan)
    with pytest.raises(NotFinite, match=r"the values of the critic are not finite: values: \d+ values .* 0 at step 0"):
        trained.iterate()


@pytest.mark.parametrize("env", [Clock, lambda: Quadrotor(N)], ids=["any", "one that ends such an episode"])
def test_actions_that_are_not_finite_are_named(env):
    trained = trainer(env())
    trained.iterate()
    with torch.no_grad():
        next(iter(trained.policy.actor.parameters())).fill_(math.nan)
    with pytest.raises(
        NotFinite, match=r"the actions of the policy are not finite: actions: \d+ values .* 0 at step 0"
    ):
        trained.iterate()


def test_advantages_that_are_not_finite_are_named():
    """Rewards and values are, their sum is not."""
    env = Clock()
    env.step = lambda actions: Clock.step(env, actions)._replace(rewards=torch.full((N,), 3e38))
    with pytest.raises(FloatingPointError, match="the advantages are not finite"):
        trainer(env, ppo={"gamma": 1.0, "lam": 1.0}).iterate()


def test_a_reset_step_may_have_any_reward():
    env = Clock()
    env.autoreset = "next_step"
    valid = torch.tensor([True, True, True, False])
    env.step = lambda actions: Clock.step(env, actions)._replace(
        rewards=torch.where(valid, 1.0, math.nan), valid=valid, final_obs=None
    )
    assert math.isfinite(trainer(env).iterate()["value_loss"])


class Failing(Clock):
    """Raises in step ``at``."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error = at, error

    def step(self, actions):
        if self.t + 1 == self.at:
            raise self.error
        return super().step(actions)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_a_failure_keeps_the_last_whole_iteration(tmp_path):
    lines = []
    failing = trainer(Failing(2 * T + 3, RuntimeError("the simulator")), tmp_path, lines.append)
    with pytest.raises(RuntimeError, match="the simulator"):
        failing.train()
    state = checkpoint.load(tmp_path / "model_2.pt")
    assert state["iteration"] == 2 and same(state["policy"], failing.policy.state_dict())
    assert str(tmp_path / "model_2.pt") in lines[-1]


def test_a_failure_in_the_middle_of_an_update_keeps_the_state_before_it(tmp_path):
    failing = trainer(Clock(), tmp_path)
    step, calls, before = failing.learner.step, [], {}

    def fail(minibatch):
        calls.append(1)
        if len(calls) == 5:  # the second iteration's first step
            before.update({name: x.clone() for name, x in failing.policy.state_dict().items()})
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return step(minibatch)

    failing.learner.step = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.train()
    state = checkpoint.load(tmp_path / "model_1.pt")
    assert same(state["policy"], before) and not same(before, failing.policy.state_dict())
    assert trainer(Clock(), resume=str(tmp_path / "model_1.pt")).iterate()["iteration"] == 2


@pytest.mark.parametrize("at", [1, T + 1])
def test_a_failure_keeps_nothing_that_is_worth_nothing(at, tmp_path):
    """Neither first weights nor weights that are not finite."""
    failing = trainer(Failing(at, RuntimeError("the simulator")), tmp_path)
    if at > T:
        finite = failing.iterate
        failing.iterate = lambda: (finite(), failing.policy.std_param.data.fill_(math.nan))[0]
    with pytest.raises(RuntimeError):
        failing.train()
    assert not list(tmp_path.glob("model_*.pt"))


def test_a_closed_output_keeps_what_was_learnt(tmp_path):
    def echo(line):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        trainer(Clock(), tmp_path, echo).train()
    assert (tmp_path / "model_1.pt").exists()


def test_the_first_interrupt_says_at_once_what_happens(tmp_path):
    lines = []

    class Interrupted(Clock):
        def step(self, actions):
            if self.t == 1:
                signal.raise_signal(signal.SIGINT)
                assert lines == ["finishing this iteration and saving; Ctrl-C again stops now"]
            return super().step(actions)

    outcome = trainer(Interrupted(), tmp_path, lines.append).train()
    assert outcome.reason == "interrupted" and lines[-2] == "Interrupted, after 1 iterations."


def test_an_interrupt_in_the_middle_of_a_print_still_counts():
    def echo(line):
        if line.startswith("finishing"):
            raise RuntimeError("reentrant call")

    class Interrupted(Clock):
        def step(self, actions):
            if self.t == 1:
                signal.raise_signal(signal.SIGINT)
            return super().step(actions)

    assert trainer(Interrupted(), echo=echo).train().iterations == 1


def test_the_end_is_said_once():
    lines = []
    trainer(Clock(), echo=lines.append).train()
    assert lines[-1] == "All 3 iterations are done."


def saved(tmp_path, **kwargs):
    return trainer(Clock(), tmp_path / "first", **kwargs).train().checkpoint


def test_resuming_with_other_hidden_layers_names_both(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"hidden_dims: expected \(16, 16\), .*model_3\.pt, got \(32,\)"):
        trainer(Clock(), iterations=5, resume=str(path), ppo={"hidden_dims": (32,)})


def test_resuming_in_another_environment_names_what_differs(tmp_path):
    path, env = saved(tmp_path), Clock()
    env.obs = 4
    with pytest.raises(ValueError, match=r"actor\.0\.weight: expected shape \(16, 4\) .*, got \(16, 3\)"):
        trainer(env, iterations=5, resume=str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iteration": "3"}, "iteration: expected an int of at least 0, got '3'"),
        ({"policy": [1]}, "expected the weights of a policy"),
        ({"policy": {}}, r"actor\.0\.bias: expected shape"),
        ({"learner": {}}, "expected the state of Adam"),
        ({"learner": None}, "expected the state of Adam"),
    ],
)
def test_resuming_from_what_is_no_checkpoint_of_a_training(change, message, tmp_path):
    path = saved(tmp_path)
    checkpoint.save(path, {**checkpoint.load(path), **change})
    with pytest.raises(ValueError, match=message):
        trainer(Clock(), iterations=5, resume=str(path))


def test_resuming_at_the_end_writes_nothing(tmp_path):
    path, lines = saved(tmp_path), []
    outcome = trainer(Clock(), tmp_path / "second", lines.append, iterations=3, resume=str(path)).train()
    assert outcome.checkpoint is None and outcome.figures == {} and outcome.iterations == 3
    assert lines == ["Nothing to do: the checkpoint stands at iteration 3 of 3."]
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("schedule", ["fixed", "adaptive"])
def test_resuming_goes_on_with_the_adapted_rate_unless_another_is_given(schedule, tmp_path):
    first = trainer(Clock(), tmp_path, ppo={"learning_rate": 2e-3, "schedule": schedule})
    first.learner.learning_rate.fill_(5e-4)
    path, lines = first.save(), []
    again = trainer(Clock(), iterations=5, resume=str(path), ppo={"learning_rate": 2e-3, "schedule": schedule})
    assert again.learner.learning_rate.item() == pytest.approx(5e-4 if schedule == "adaptive" else 2e-3)
    ppo = {"learning_rate": 1e-3, "schedule": schedule}
    other = trainer(Clock(), echo=lines.append, iterations=1, resume=str(path), ppo=ppo)
    assert other.learner.learning_rate.item() == pytest.approx(1e-3)
    assert other.learner.optimizer.param_groups[0]["lr"] is other.learner.learning_rate
    other.train()
    assert "Changed since the checkpoint: learning_rate 0.002, now 0.001." in lines


def test_another_schedule_begins_at_the_rate_that_was_reached(tmp_path):
    path = saved(tmp_path, ppo={"learning_rate": 2e-3, "schedule": "fixed"})
    second = trainer(Clock(), iterations=5, resume=str(path), ppo={"learning_rate": 2e-3, "schedule": "adaptive"})
    assert second.learner.learning_rate.item() == pytest.approx(2e-3)


# Another value of each setting that a resumed training keeps, of a feedforward policy of groups.
KEPT = {
    "hidden_dims": ((16, 16), (32,)),
    "activation": ("tanh", "relu"),
    "recurrent": ("none", "lstm"),
    "rnn_dim": (64, 8),
    "actor_obs": (("policy",), ("same",)),
    "critic_obs": (("critic",), ("policy",)),
    "normalize_obs": (False, True),
    "normalize_values": (False, True),
    "init_std": (1.0, 0.5),
}


class Twins(Clock):
    """With two groups of one size, which weights cannot tell apart."""

    obs = dict.fromkeys(("policy", "same", "critic"), ((3,), torch.float32))

    def _obs(self):
        return {name: torch.full((N, 3), float(i + self.t % 3)) for i, name in enumerate(self.obs)}


@pytest.mark.parametrize("name", ON_RESUME["kept"])
def test_what_a_resumed_training_keeps_is_refused_by_name(name, tmp_path):
    first = trainer(Twins(), tmp_path, ppo={"actor_obs": ("policy",), "critic_obs": ("critic",)})
    path, (old, new) = first.save(), KEPT[name]
    for given in ({name: new}, {name: old}):
        ppo = {"actor_obs": ("policy",), "critic_obs": ("critic",), **given}
        if given[name] == old:
            assert trainer(Twins(), resume=str(path), ppo=ppo).iteration == 0
            continue
        with pytest.raises(ValueError) as raised:
            trainer(Twins(), resume=str(path), ppo=ppo)
        assert str(raised.value) == (
            f"{name}: expected {old!r}, that of the checkpoint {path}, got {new!r}: a resumed training keeps it"
        )


def test_every_setting_says_what_a_resume_makes_of_it():
    """A new one has to be put into the table, and into the document."""
    names = [f.name for cls in (TrainConfig, PPOConfig) for f in dataclasses.fields(cls) if f.name != "ppo"]
    assert sorted(names) == sorted(name for kind in ON_RESUME.values() for name in kind)
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    for name in (*ON_RESUME["kept"], *ON_RESUME["new"]):
        assert f"`{name}`" in text, f"{name}: docs/training.md lists what a resume changes and keeps"


@pytest.mark.parametrize(("normalize", "scale"), [(False, 0.25), (False, 1.0), (True, 0.5)])
def test_a_resumed_training_takes_the_given_reward_scale(normalize, scale, tmp_path):
    path = saved(tmp_path, ppo={"reward_scale": 0.5})
    ppo = {"reward_scale": scale, "normalize_rewards": normalize}
    second = trainer(Clock(), iterations=4, resume=str(path), ppo=ppo)
    second.iterate()
    scaler, rewards = second.reward_scaler, torch.ones(N, T)
    if scaler is None:
        assert scale == 1
        return
    codes = torch.zeros(N, T, dtype=torch.uint8)
    scaler.apply_to(rewards, codes)
    expected = scale / scaler.moments.std if normalize else torch.tensor(scale)
    torch.testing.assert_close(rewards, expected.float().expand(N, T))


@pytest.mark.parametrize(
    "ppo", [{}, {"learner": "torch"}, {"advantage_scope": "minibatch"}], ids=["default", "torch", "minibatch"]
)
def test_planned_memory_is_what_is_held_in_the_end(ppo):
    ppo |= {"num_minibatches": 5}  # of 4, 5, 5, 5, 5 samples
    trained = trainer(Clock(lambda t: [t % 4 == 0] * N), ppo=ppo)
    gathers = trained.learner.not_fused is not None or "advantage_scope" in ppo
    assert (trained.planned_nbytes > trained.buffer.nbytes) == gathers
    trained.iterate()
    assert trained.planned_nbytes == trained.buffer.nbytes
