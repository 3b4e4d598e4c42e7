"""Training on a GPU: the loss kernel, and iterations captured as one CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pydrone.buffer import RolloutBuffer
from pydrone.envs import Randomization
from pydrone.envs.quadrotor import Quadrotor
from pydrone.ops.schema import MATMUL
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.learner.learner import ZERO_KL, Learner
from pydrone.ppo.policy import matmul as precision
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training import checkpoint, graphs

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

N, T, ITERATIONS, DEVICE = 256, 12, 4, "cuda"


def make(capture: bool, resume: str | None = None, **ppo: object) -> Trainer:
    env = Quadrotor(N, DEVICE, seed=3, max_episode_length=20)
    config = TrainConfig(num_steps=T, capture=capture, resume=resume, ppo=PPOConfig(hidden_dims=(32, 32), **ppo))
    return Trainer(env, config, echo=lambda line: None)


@pytest.mark.parametrize(
    "ranges", [None, Randomization(mass=(0.8, 1.2), latency=(0, 2), wind=(0, 0.1), pos_noise=(0, 1))]
)
def test_a_step_of_the_quadrotor_is_three_launches_at_most(ranges):
    """The draws and the kernel."""
    env = Quadrotor(N, "cuda", randomization=ranges)
    assert env.task.not_fused is None
    actions = torch.zeros(N, 4, device="cuda")
    env.step(actions)
    made = calls(lambda: env.step(actions))
    launches = sum(number for name, number in made.items() if "LaunchKernel" in name)
    assert 0 < launches <= (2 if ranges is None else 3), made


def compared(figures: dict[str, float]) -> dict[str, float]:
    return {name: x for name, x in figures.items() if not name.startswith(("time/", "steps_per_second"))}


def calls(run: Callable[[], object]) -> Counter[str]:
    """The CUDA calls that the host makes, by name."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
    return Counter(event.name for event in recorded.events() if event.name.startswith("cu"))


def iterated(iterations: int, capture: bool, **ppo: object) -> tuple[Trainer, list[dict[str, float]]]:
    """A trainer and its metrics per iteration. Made here, since a trainer seeds the generator that all share."""
    trainer = make(capture, **ppo)
    return trainer, [compared(trainer.iterate()) for _ in range(iterations)]


@pytest.mark.parametrize("options", [{}, {"normalize_obs": True, "normalize_values": True, "learner": "torch"}])
def test_captured_training_equals_eager_training(options):
    eager, expected = iterated(ITERATIONS, False, **options)
    replayed, found = iterated(ITERATIONS, True, **options)
    assert replayed._graph._replay is not None
    for ours, theirs in zip(found, expected, strict=True):
        # cuBLAS may choose other algorithms on another stream, whose sums differ in the last bits.
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)
    for name, x in eager.policy.state_dict().items():
        torch.testing.assert_close(replayed.policy.state_dict()[name], x, rtol=1e-3, atol=1e-4, msg=name)


def test_captured_training_resumes_from_its_checkpoint(tmp_path):
    _, expected = iterated(ITERATIONS, True)
    first, _ = iterated(2, True)
    path = checkpoint.save(tmp_path / "model_2.pt", first.state_dict())
    resumed = make(True, resume=str(path))
    for figures in expected[2:]:
        assert compared(resumed.iterate()) == pytest.approx(figures, rel=1e-3, abs=1e-4, nan_ok=True)


class NotCapturable(Quadrotor):
    capturable = False


def test_the_update_captured_alone_equals_eager_training():
    """As for Genesis, whose steps a capture forbids."""
    rows = []
    for capture in (False, "auto"):
        env = NotCapturable(N, DEVICE, seed=3, max_episode_length=20)
        config = TrainConfig(num_steps=T, capture=capture, ppo=PPOConfig(hidden_dims=(32, 32)))
        trainer = Trainer(env, config, echo=lambda line: None)
        rows.append([compared(trainer.iterate()) for _ in range(ITERATIONS)])
        assert trainer._graph is None and (trainer.update_graph is None) == (capture is False)
    assert trainer.update_graph._replay is not None
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("matmul", MATMUL)
def test_before_the_first_step_the_policy_is_the_one_that_acted(matmul):
    """Acting and learning round alike: the KL divergence of a rollout's first minibatch counts as zero."""
    trainer = make(False, matmul=matmul)
    trainer.start()
    last_values, bootstrap = trainer.collect()
    trainer.buffer.compute_gae(last_values, **bootstrap)
    minibatches = iter(trainer.learner._minibatches(trainer.buffer))
    kl = trainer.learner.compute_gradients(next(minibatches))[-1].item()
    assert abs(kl) <= ZERO_KL, kl


@pytest.mark.parametrize("capacity", [T, T + 5, 2 * T])
def test_acting_and_learning_in_a_ring_replayed(capacity):
    """The device's counters say where a replay's steps go, and which rollout its minibatches read."""

    def rollout(learner: Learner, buffer: RolloutBuffer) -> None:
        with torch.no_grad():
            acting, ends = learner.acting(buffer), None
            for t in range(T):
                acting(obs[t], ends)
                ends = {"rewards": rewards[t], "dones": dones[t]}
            buffer.end(**ends)
        buffer.compute_gae(learner.policy.value(obs[T]).detach(), check=False)
        learner.update(buffer)

    obs = torch.randn(T + 1, N, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rewards, dones = obs[:, :, 0], obs[:, :, 1] > 1.5
    found = []
    for captured in (False, True):
        torch.manual_seed(1)
        config = PPOConfig(hidden_dims=(32, 32), num_minibatches=3, num_epochs=2)
        learner = Learner(make_policy(7, 2, config).to(DEVICE), config)
        options = {"fields": learner.policy.fields(), "capacity": capacity, "final_obs_rows": 0}
        buffer = RolloutBuffer(N, T, obs=7, actions=2, device=DEVICE, **options)
        if not captured:
            for _ in range(ITERATIONS):
                rollout(learner, buffer)
                buffer.clear()
        else:
            stream, replay = graphs.side_stream(torch.device(DEVICE)), None

            def on_the_device(learner=learner, buffer=buffer) -> None:
                with buffer.as_captured():
                    rollout(learner, buffer)

            for i in range(ITERATIONS):
                buffer.advance(T)
                if i == 1:
                    with graphs.capturable(learner):
                        replay = graphs.capture(on_the_device, (), stream)
                if replay is None:
                    graphs.aside(on_the_device, stream)
                else:
                    replay()
                buffer.check()
                buffer.clear()
        found.append([x.detach().clone() for x in learner.policy.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("matmul", ["float32", "tf32"])
def test_the_precision_of_torchs_products_holds_in_a_graph(matmul):
    x, w = torch.randn(512, 256, device=DEVICE), torch.randn(256, 128, device=DEVICE)

    def product() -> torch.Tensor:
        with precision.products(matmul, torch.device(DEVICE)):
            return x @ w

    exact, eager = x.double() @ w.double(), product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = product()
    graph.replay()
    errors = [((y - exact).abs().max() / exact.abs().max()).item() for y in (eager, replayed)]
    assert all(x < 2e-6 if matmul == "float32" else 2e-5 < x < 2e-3 for x in errors), errors


def test_the_loss_kernel_equals_autograd():
    (ours, found), (theirs, expected) = iterated(2, False), iterated(2, False, learner="torch")
    assert ours.learner.fused_loss is not None and theirs.learner.fused_loss is None
    for figures, others in zip(found, expected, strict=True):
        assert figures == pytest.approx(others, rel=1e-2, abs=1e-3, nan_ok=True)


@pytest.mark.parametrize("capture", [False, True])
def test_the_host_reads_once_per_iteration(capture):
    trainer = make(capture)
    for _ in range(3):
        trainer.iterate()
    own, found = calls(lambda: None), calls(trainer.iterate)
    found.subtract(own)  # the profiler's own calls
    waits = {name: n for name, n in found.items() if "Synchronize" in name and "Event" not in name}
    assert sum(waits.values()) <= 1, waits  # the one read
    launched = {name: n for name, n in found.items() if name.startswith(("cudaLaunch", "cuLaunch"))}
    if capture:
        # besides the graph: seed and offset of torch's generator and of the environment's
        assert found["cudaGraphLaunch"] == 1 and sum(launched.values()) <= 4, launched
    else:
        assert found["cudaGraphLaunch"] == 0 and sum(launched.values()) > 100
