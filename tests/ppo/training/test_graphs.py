"""Iterations as graphs, emulated on the CPU: a captured training is the uncaptured one to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import capture_emulation
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pydrone
from pydrone.envs.quadrotor import Quadrotor, QuadrotorCourse
from pydrone.envs.randomization import Randomization
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.distributed import ALONE
from pydrone.ppo.learner import fused_loss
from pydrone.ppo.trainer import NotFinite, Trainer, progress_line
from pydrone.ppo.training import checkpoint, graphs
from pydrone.ppo.training.average import deployed
from pydrone.ppo.training.meters import Stopwatch

cpu = pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason=str(pydrone.backends()["cpu"]))
N, T, ITERATIONS = 12, 6, 4


@pytest.fixture
def on_the_cpu(monkeypatch) -> list[str]:
    """Graphs as if the CPU had them. Returns what was captured."""
    monkeypatch.setattr(graphs, "why_not", lambda trainer: None)
    return capture_emulation.emulate(monkeypatch)


def make(capture: bool, ppo: dict | None = None, env: dict | None = None, kind: type = Quadrotor, **config) -> Trainer:
    sizes = {"hidden_dims": (16,), "num_epochs": 2, "num_minibatches": 3, "learner": "torch"}
    settings = PPOConfig(**sizes | (ppo or {}))
    env = kind(N, seed=3, max_episode_length=9, **(env or {}))
    config = TrainConfig(**{"num_steps": T, "iterations": ITERATIONS, "capture": capture, "ppo": settings} | config)
    trainer = Trainer(env, config, echo=lambda line: None)
    if settings.learner == "torch":
        trainer.learner.fused_loss = fused_loss.FusedLoss(trainer.policy)  # as on CUDA
    return trainer


def same_figures(found: dict[str, float], expected: dict[str, float]) -> None:
    timed = ("time/", "steps_per_second")
    assert {x for x in found if not x.startswith(timed)} == {x for x in expected if not x.startswith(timed)}
    for name in expected:
        if not name.startswith(timed):
            assert found[name] == pytest.approx(expected[name], abs=0, rel=0, nan_ok=True), name


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, x in expected.items():
        assert torch.equal(x, found[name]), name


def adams(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.learner.state_dict()["state"]
    return {f"{i}.{name}": x for i, moments in state.items() for name, x in moments.items()}


VARIED = Randomization(mass=(0.8, 1.2), motor_lag=(0.01, 0.05), latency=(0, 2), wind=(0, 0.02), gyro_noise=(0, 0.1))
CASES = {
    "plain": {},
    "fused": {"ppo": {"learner": "fused", "init_std": 1e-6}},
    "normalised": {"ppo": {"normalize_obs": True, "normalize_values": True, "normalize_rewards": True}},
    "minibatches": {"ppo": {"schedule": "linear", "advantage_scope": "minibatch", "obs_dtype": "bfloat16"}},
    "randomised": {"env": {"randomization": VARIED}, "random_episode_starts": False, "ppo": {"reward_scale": 0.1}},
    "standard deviations below their floor": {"ppo": {"schedule": "fixed", "entropy_coef": 1.0, "init_std": 1e-9}},
    "course": {"kind": QuadrotorCourse, "ppo": {"schedule": "fixed", "activation": "elu", "ema_decay": 0.8}},
}


@cpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_captured_training_is_the_uncaptured_one(case, on_the_cpu):
    eager = make(False, **case)
    expected = [eager.iterate() for _ in range(ITERATIONS)]
    assert on_the_cpu == []
    replayed = make(True, **case)  # which seeds torch's generator again
    found = [replayed.iterate() for _ in range(ITERATIONS)]
    assert on_the_cpu == ["_compute"]
    for ours, theirs in zip(found, expected, strict=True):
        same_figures(ours, theirs)
    assert len({figures["surrogate_loss"] for figures in found}) == ITERATIONS
    assert sum(figures["episodes"] for figures in found) > 0
    same_tensors(deployed(replayed.learnt()), deployed(eager.learnt()))
    assert replayed.policy.std_param.min() > 1e-4  # it rose
    same_tensors(replayed.policy.state_dict(), eager.policy.state_dict())
    same_tensors(adams(replayed), adams(eager))
    same_tensors(replayed.env.state_dict(), eager.env.state_dict())
    same_tensors(replayed.figures.running_episodes.state_dict(), eager.figures.running_episodes.state_dict())
    if eager.reward_scaler is not None:
        same_tensors(replayed.reward_scaler.state_dict(), eager.reward_scaler.state_dict())
    ours, theirs = replayed.buffer.state_dict(), eager.buffer.state_dict()
    assert ours["appended"] == ours["discarded"]
    same = ("appended", "discarded", "computed", "epoch", "truncations", "resets")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert replayed.buffer._storage.cursor.tolist() == [ours["appended"], ours["discarded"], 0, 0, T]


class Outside(TorchDispatchMode):
    """Names of the operations that are no views, and of no replay."""

    def __init__(self) -> None:
        super().__init__()
        self.replaying, self.names = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.replaying and not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@cpu
@pytest.mark.parametrize("case", [CASES["plain"], CASES["normalised"]], ids=["plain", "normalised"])
def test_a_captured_training_by_the_fused_operations_is_the_uncaptured_one(case, on_the_cpu):
    """Which read minibatches in the ring, by the device's counters."""
    trained = []
    for capture in (False, True):
        trainer = make(capture, **case)
        trainer.learner.not_fused = None
        trained.append((trainer, [trainer.iterate() for _ in range(ITERATIONS)]))
    (eager, expected), (replayed, found) = trained
    for ours, theirs in zip(found, expected, strict=True):
        same_figures(ours, theirs)
    same_tensors(replayed.policy.state_dict(), eager.policy.state_dict())
    same_tensors(adams(replayed), adams(eager))


@cpu
@pytest.mark.parametrize("schedule", ["adaptive", "linear"])
def test_a_replayed_iteration_is_one_launch_and_one_read(schedule, on_the_cpu):
    """All else that the device did would be an operation here: what a linear schedule sets is the only one."""
    trainer = make(True, {"schedule": schedule, "normalize_rewards": True, "normalize_obs": True})
    for _ in range(2):
        trainer.iterate()
    outside, replay = Outside(), trainer._graph._replay

    def replayed() -> None:
        outside.replaying = True
        replay()
        outside.replaying = False

    trainer._graph._replay = replayed
    with outside:
        figures = trainer.iterate()
    assert outside.names == (["aten::fill_"] if schedule == "linear" else [])
    assert figures["time/iteration"] >= figures["time/replay"] > 0
    assert {name for name in figures if name.startswith("time/")} == {"time/iteration", "time/replay", "time/process"}
    assert f"steps/s  replay {figures['time/replay']:.2f} s  left" in progress_line(figures, ITERATIONS, 0.0)


def launched(x: object) -> object:
    """What of an operation's argument decides which kernel is compiled for it, and how its memory is read."""
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.stride(), x.data_ptr() % 16
    return tuple(map(launched, x)) if isinstance(x, (list, tuple)) else type(x)


@cpu
def test_a_capture_launches_no_kernel_that_the_first_iteration_has_not(on_the_cpu):
    """Of pydrone's own, which Triton compiles and loads at the first call: not to be done in a capture."""
    trainer = make(True, {"normalize_values": True})
    trainer.start()
    seen: list[set] = [set(), set()]

    def noted(operation):
        def call(*args) -> None:
            seen[trainer.iteration].add((getattr(operation, "__name__", ""), launched(args)))
            operation(*args)

        return call

    ops, loss = trainer.buffer._storage.ops, torch.ops.pydrone.ppo_loss
    trainer.buffer._storage.ops = ops._replace(gae=noted(ops.gae), append=noted(ops.append), gather=noted(ops.gather))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.pydrone, "ppo_loss", noted(loss))
        trainer.iterate()
        trainer.iterate()
    assert on_the_cpu == ["_compute"] and len(seen[0]) >= 5
    assert seen[1] == seen[0]


@cpu
@pytest.mark.parametrize("fused", [False, True])
def test_no_autograd_graph_outlives_an_iteration(fused, on_the_cpu):
    """A node of one that did would run on the stream that it was made on, in the middle of a capture of another."""
    trainer, kept = make(False), []
    if not fused:
        trainer.learner.fused_loss = None
    name = "outputs" if fused else "mean"
    weight, run = trainer.policy.actor[0].weight, getattr(trainer.policy, name)

    def node():
        return weight.expand_as(weight).grad_fn.next_functions[0][0]  # that there is, or a new one

    def marked(*given):
        result = run(*given)
        if torch.is_grad_enabled():
            node().metadata["seen"] = True
            kept.append(node().metadata.get("seen"))
        return result

    setattr(trainer.policy, name, marked)
    trainer.iterate()
    assert kept == [True] * 6 and "seen" not in node().metadata


@cpu
def test_a_captured_training_goes_on_from_its_checkpoint(on_the_cpu, tmp_path):
    whole = make(False)
    expected = [whole.iterate() for _ in range(ITERATIONS)]
    first = make(True)
    for _ in range(2):
        first.iterate()
    state = checkpoint.save(tmp_path / "model_2.pt", first.state_dict())
    resumed = make(True, resume=str(state))
    for figures in expected[2:]:
        same_figures(resumed.iterate(), figures)
    same_tensors(resumed.policy.state_dict(), whole.policy.state_dict())


@cpu
@pytest.mark.parametrize("failing", [1, 2, 4], ids=["run", "captured", "replayed"])
def test_what_is_saved_after_a_failure_is_of_before_the_update(failing, on_the_cpu, monkeypatch):
    trainer = make(True)
    for _ in range(failing - 1):
        trainer.iterate()
    before = checkpoint.copied(trainer.learnt())

    def fail(computed, stop) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(trainer.figures, "read", fail)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.iterate()
    kept = trainer.before_update
    assert kept["iteration"] == failing - 1
    same_tensors(kept["policy"], before["policy"])
    assert not torch.equal(kept["policy"]["std_param"], trainer.policy.std_param)
    for i, moments in before["learner"]["state"].items():
        same_tensors(kept["learner"]["state"][i], moments)


@cpu
def test_a_capture_that_fails_leaves_the_iteration_before(on_the_cpu, monkeypatch):
    trainer = make(True)
    trainer.iterate()
    before = checkpoint.copied(trainer.learnt())
    monkeypatch.setattr(trainer.policy, "bound_std", lambda: trainer.policy.std_param.sum().item())
    with pytest.raises(RuntimeError, match="waits for the device"):
        trainer.iterate()
    assert trainer.before_update is None, "nothing has been computed: the state is that of the trainer"
    same_tensors(trainer.policy.state_dict(), before["policy"])
    assert [group["capturable"] for group in trainer.learner.optimizer.param_groups] == [False]
    assert isinstance(trainer._watch, Stopwatch)


def test_what_cannot_be_captured_is_refused_with_the_reason():
    def reason(**change) -> str | None:
        trainer = SimpleNamespace(
            device=torch.device("cuda"),
            env=SimpleNamespace(capturable=True, autoreset="same_step"),
            config=SimpleNamespace(ppo=PPOConfig(**change.pop("ppo", {}))),
            policy=SimpleNamespace(recurrent=False),
            ranks=ALONE,
        )
        vars(trainer).update(change)
        return graphs.why_not(trainer)

    assert reason() is None
    assert reason(device=torch.device("cpu")) == "it needs a CUDA device, the environment is on cpu"
    assert "SimpleNamespace does not say" in reason(env=SimpleNamespace(autoreset="same_step"))
    assert "autoreset is 'next_step'" in reason(env=SimpleNamespace(capturable=True, autoreset="next_step"))
    assert "recurrent" in reason(policy=SimpleNamespace(recurrent=True))
    assert "max_kl" in reason(ppo={"max_kl": 0.1})
    assert "autocast" in reason(ppo={"autocast": True})
    assert "several processes" in reason(ranks=SimpleNamespace(several=True))
    with pytest.raises(ValueError, match=r"^capture: expected False here: it needs a CUDA device"):
        Trainer(Quadrotor(4), TrainConfig(num_steps=2, capture=True, ppo=PPOConfig(num_minibatches=1)))


@cpu
def test_observations_that_move_are_refused(on_the_cpu, monkeypatch):
    step = Quadrotor.step

    def elsewhere(self, actions):
        result = step(self, actions)
        return result._replace(obs=result.obs.clone())

    monkeypatch.setattr(Quadrotor, "step", elsewhere)
    with pytest.raises(RuntimeError, match="writes its observations to the same memory"):
        trainer = make(True)
        trainer.iterate()
        trainer.iterate()


class Crashing(Quadrotor):
    """In its 15th step, the third iteration's third, one environment's observation is NaN."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = torch.zeros(())

    def step(self, actions):
        result = super().step(actions)
        self.steps += 1
        result.obs[2, 0] = torch.where(self.steps == 2 * T + 2, torch.nan, result.obs[2, 0])
        return result


@cpu
@pytest.mark.parametrize("capture", [False, True])
def test_what_is_not_finite_is_named_after_a_replay(capture, on_the_cpu):
    trainer = make(capture, kind=Crashing)
    trainer.iterate()
    trainer.iterate()
    with pytest.raises(
        NotFinite, match=r"the observations of the environment are not finite: obs: 1 value .* 2 at step 2"
    ):
        trainer.iterate()


class Short(Quadrotor):
    """Its time limit is three steps, and it states another."""

    def __init__(self, *args, max_episode_length: int, **options) -> None:
        super().__init__(*args, max_episode_length=3, **options)
        self.max_episode_length = 1000


@cpu
def test_a_pool_that_has_grown_is_captured_anew(on_the_cpu, monkeypatch):
    """Time-outs every three steps, where the limit says 1000: 24 in a rollout, with room for 12."""
    monkeypatch.setattr(Trainer, "_make_room", lambda *_: None)  # as on CUDA
    figures, trained = [], []
    for capture in (False, True):
        trained.append(make(capture, random_episode_starts=False, kind=Short))
        done = [trained[-1].iterate() for _ in range(2)]
        trained[-1].grow_final_obs(30)  # as a later rollout would have it
        if capture:
            trained[-1]._graph.forget()
        figures.append([*done, *(trained[-1].iterate() for _ in range(2))])
    assert on_the_cpu == ["_compute"] * 2
    for ours, theirs in zip(*figures, strict=True):
        same_figures(ours, theirs)
        assert ours["episodes"] == 24
    same_tensors(trained[1].policy.state_dict(), trained[0].policy.state_dict())
    assert trained[0].buffer.layout.final_obs_rows == trained[1].buffer.layout.final_obs_rows == 60


# ---------------------------------------------------------------------------------------------- capture is "auto"


@pytest.fixture
def only_updates(on_the_cpu, monkeypatch) -> list[str]:
    """As :func:`on_the_cpu`, with environments that cannot be captured."""
    monkeypatch.setattr(graphs, "why_not", lambda trainer: "its physics is a library's")
    monkeypatch.setattr(graphs, "why_not_update", lambda trainer: None)
    return on_the_cpu


@cpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_update_captured_alone_is_the_uncaptured_one(case, fused, only_updates):
    trained = []
    for capture in (False, "auto"):
        trainer = make(capture, **case)
        if fused:
            trainer.learner.not_fused = None
        trained.append((trainer, [trainer.iterate() for _ in range(ITERATIONS)]))
    (eager, expected), (replayed, found) = trained
    assert only_updates == ["update"]
    for ours, theirs in zip(found, expected, strict=True):
        same_figures(ours, theirs)
    same_tensors(adams(replayed), adams(eager))
    same_tensors(replayed.policy.state_dict(), eager.policy.state_dict())
    assert {f"time/{x}" for x in ("env", "policy", "storage", "gae", "update")} < found[-1].keys()
    assert len({figures["surrogate_loss"] for figures in found}) == ITERATIONS
    assert fused or replayed.buffer.nbytes == replayed.planned_nbytes  # planned before the test made it so


@cpu
def test_a_replayed_update_is_one_launch(only_updates):
    trainer = make("auto", {"normalize_values": True, "schedule": "adaptive"})
    for _ in range(2):
        trainer.iterate()
    outside, graph = Outside(), trainer.update_graph
    replay, update = graph._replay, trainer.update_graph

    def replayed() -> None:
        outside.replaying = True
        replay()
        outside.replaying = False

    def watched(buffer):
        with outside:
            return update(buffer)

    graph._replay, trainer.update_graph = replayed, watched
    trainer.iterate()
    assert outside.names == ["aten::copy_"]  # the host's counters, for the device


@cpu
def test_an_update_with_reset_steps_is_not_replayed(only_updates):
    class Resets(Quadrotor):
        def step(self, actions):
            return super().step(actions)._replace(valid=torch.arange(self.num_envs) > 0)

    trainer = make("auto", kind=Resets)
    figures = [trainer.iterate() for _ in range(3)]
    assert only_updates == [] and all(x["surrogate_loss"] < 1 for x in figures)


@cpu
def test_an_update_goes_on_from_its_checkpoint(only_updates, tmp_path):
    whole = make(False)
    expected = [whole.iterate() for _ in range(ITERATIONS)]
    first = make("auto")
    for _ in range(2):
        first.iterate()
    state = checkpoint.save(tmp_path / "model_2.pt", first.state_dict())
    resumed = make("auto", resume=str(state))
    for figures in expected[2:]:
        same_figures(resumed.iterate(), figures)
    same_tensors(resumed.policy.state_dict(), whole.policy.state_dict())


@cpu
def test_auto_captures_all_where_it_can(on_the_cpu):
    trainer = make("auto")
    for _ in range(3):
        trainer.iterate()
    assert on_the_cpu == ["_compute"] and trainer.update_graph is None and trainer.captured


@pytest.mark.parametrize(
    ("of_all", "of_update", "line"),
    [
        (
            "its physics is a library's",
            None,
            "Only the update is captured as a CUDA graph: its physics is a library's.",
        ),
        ("the policy is recurrent", "the policy is recurrent", None),
    ],
)
def test_what_is_not_captured_is_said_once(of_all, of_update, line, on_the_cpu, monkeypatch):
    monkeypatch.setattr(graphs, "why_not", lambda trainer: of_all)
    monkeypatch.setattr(graphs, "why_not_update", lambda trainer: of_update)
    lines: list[str] = []
    config = TrainConfig(num_steps=2, iterations=1, ppo=PPOConfig(num_minibatches=1, hidden_dims=(4,)))
    trainer = Trainer(Quadrotor(4), config, echo=lines.append)
    assert config.capture == "auto" and trainer._graph is None
    trainer.train()
    assert [x for x in lines if "captured" in x] == ([line] if line else [])  # on a CPU there is nothing to say


def test_capture_is_one_of_three():
    for value in ("yes", None, 1, "true"):
        with pytest.raises(ValueError, match=r"^capture: expected True, False or 'auto', got "):
            TrainConfig(capture=value)
