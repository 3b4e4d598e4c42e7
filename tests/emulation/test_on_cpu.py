"""The CUDA kernels, compiled for the CPU: the CPU suite's tests that take a backend, and direct calls."""

from __future__ import annotations

import bad_input
import pytest
import test_non_finite
import test_ops
import torch
from rollout_model import assert_close, rollout
from shared_cases import MODULES, cases

from pydrone import RolloutBuffer, gae

found = cases(*MODULES, test_non_finite)
del found["test_buffer_state_repr_and_truth"]  # expects the backend's name
globals().update(found)


@pytest.fixture
def direct(operations, monkeypatch) -> None:
    """Replaces torch.ops.pydrone in the modules that call operations directly."""
    for module in (test_ops, bad_input):
        monkeypatch.setattr(module, "OPS", torch.ops.pydrone_emulated)


@pytest.mark.parametrize("name", test_ops.SCHEMAS)
def test_agrees_with_the_reference(name, direct):
    test_ops.test_native_and_reference_agree(name)


@pytest.mark.parametrize("name", [*test_ops.HOSTILE, *test_ops.HARMLESS])
def test_hostile_and_harmless_arguments(name, direct):
    if name in test_ops.HARMLESS or name == "a pool's count below zero":  # not checked: the count is on the device
        (test_ops.HOSTILE | test_ops.HARMLESS)[name]()
    else:
        with pytest.raises(RuntimeError):
            test_ops.HOSTILE[name]()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_calls_are_refused_by_name(direct, monkeypatch):
    monkeypatch.setattr(bad_input, "SUBJECTS", {bad_input.an_op: 1})
    wrong = []
    for number in range(1000):
        case = bad_input.make(number)
        problem = bad_input.problem(case)
        if problem:
            wrong.append(f"case {number}: {case.what}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_whole_size(backend):
    """8192 x 100, two environments per warp: stored, scanned and gathered."""
    num_envs, num_steps = 8192, 100
    data = rollout(num_envs, num_steps, seed=0)
    obs = torch.randn(num_envs, num_steps, 17)
    buf = RolloutBuffer(num_envs, num_steps, obs=17, actions=4, final_obs_rows=0, backend=backend)
    for t in range(num_steps):
        scalars = {name: data[name][:, t] for name in ("rewards", "dones", "values")}
        buf.append(obs=obs[:, t], actions=obs[:, t, :4], log_probs=obs[:, t, 4], **scalars)
    buf.compute_gae(data["last_values"])
    arguments = [data[name].double() for name in ("rewards", "values", "dones", "last_values")]
    advantages, returns, stats = gae(*arguments, stats=True, backend="reference")
    assert_close(buf.advantages, advantages.float())
    assert torch.allclose(buf.statistics, stats, rtol=1e-5)
    normalized, drawn = (advantages - stats[1]) / (stats[2] / (stats[0] - 1)).sqrt(), []
    for mb in buf.minibatches(4):
        env, t = mb.indices // num_steps, mb.indices % num_steps
        assert torch.equal(mb.obs, obs[env, t])
        assert_close(mb.advantages, normalized[env, t].float())
        assert_close(mb.returns, returns[env, t].float())
        drawn.append(mb.indices)
    assert torch.equal(torch.cat(drawn).sort().values, torch.arange(num_envs * num_steps))
