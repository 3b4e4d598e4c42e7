"""pydrone.gae: its statistics, its agreement with rsl_rl, and its errors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from rollout_model import assert_close, rollout
from test_gae import with_bootstrap

import pydrone
from pydrone import gae

# ---------------------------------------------------------------------------------------------- statistics


def two_passes(advantages: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[int, float, float]:
    sample = (advantages if valid is None else advantages[valid]).double().flatten()
    mean = sample.sum().item() / max(len(sample), 1)
    return len(sample), mean, ((sample - mean) ** 2).sum().item()


@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (64, 17), (65, 16), (1023, 9), (8192, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_statistics(shape, masked, columns, backend):
    data = with_bootstrap(rollout(*shape), "final_values")
    data["rewards"] = data["rewards"] + 300  # a mean far from zero: plain sums of squares would lose the variance
    if not masked:
        del data["valid"]
    if columns:
        data = {name: x if x.dim() == 1 else x.t().contiguous().t() for name, x in data.items()}
    advantages, _, stats = gae(stats=True, backend=backend, **data)
    assert stats.dtype == torch.float64 and stats.shape == (3,)
    count, mean, m2 = two_passes(advantages, data.get("valid"))
    assert stats[0] == count
    assert stats[1].item() == pytest.approx(mean, rel=1e-6)
    assert stats[2].item() == pytest.approx(m2, rel=1e-5)


@pytest.mark.parametrize("mean", ["constant", "alternating"])
@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_statistics_of_a_mean_far_from_zero(spread, mean, backend):
    rewards = 1e3 + spread * torch.randn(20, 1000).t()
    if mean == "alternating":  # from step to step: one step says nothing about the next
        rewards[:, ::2] *= -1
    zeros = torch.zeros(1000, 20)
    advantages, _, stats = gae(rewards, zeros, zeros, torch.zeros(1000), gamma=0, stats=True, backend=backend)
    count, mean, m2 = two_passes(advantages)
    assert stats[0] == count
    assert stats[1].item() == pytest.approx(mean, abs=1e-3 * spread)
    assert stats[2].item() == pytest.approx(m2, rel=1e-3)


@pytest.mark.parametrize("num_envs", [2, 16, 48, 100, 1000])
def test_constant_advantages_have_no_spread(num_envs, backend):
    # For example a survival reward with gamma 0. A negative M2 would make every normalised advantage NaN.
    zeros = torch.zeros(num_envs, 3)
    for reward in (0.1, 0.3, 0.7, -0.01, 1000.1, -10 / 3):
        rewards = torch.full((num_envs, 3), reward)
        _, _, (count, mean, m2) = gae(
            rewards, zeros, zeros, torch.zeros(num_envs), gamma=0, stats=True, backend=backend
        )
        assert m2 >= 0, f"M2 {m2} for {reward}"
        assert math.sqrt(m2 / (count - 1)) <= 1e-7 * abs(reward)
        assert mean.item() == pytest.approx(reward, rel=1e-6)


def test_statistics_of_hardly_any_samples(backend):
    def stats(**valid) -> list[float]:
        three = torch.full((1, 2), 3.0)
        return gae(three, torch.zeros(1, 2), three, torch.zeros(1), stats=True, backend=backend, **valid)[2].tolist()

    assert stats(valid=torch.zeros(1, 2)) == [0, 0, 0]
    assert stats(valid=torch.tensor([[0, 1]])) == [1, 3, 0]
    assert stats() == [2, 3, 0]


# ---------------------------------------------------------------------------------------------- rsl_rl


@pytest.mark.parametrize("time_outs", [False, True])
def test_equals_rsl_rl(time_outs, backend):
    """Runs rsl_rl's own storage, loop and time-out rule, called as its runner calls them."""
    pytest.importorskip("rsl_rl")
    from rsl_rl.algorithms import PPO
    from rsl_rl.storage import RolloutStorage
    from tensordict import TensorDict

    num_envs, num_steps, gamma, lam = 37, 25, 0.98, 0.9
    data = rollout(num_envs, num_steps, ends=0.2)
    obs = TensorDict({"policy": torch.zeros(num_envs, 3)}, batch_size=[num_envs])
    storage = RolloutStorage("rl", num_envs, num_steps, obs, (2,))
    network = SimpleNamespace(reset=lambda *a, **k: None, get_hidden_state=lambda: None)

    class Critic(SimpleNamespace):
        def __call__(self, _):
            return data["last_values"].unsqueeze(1)

    algorithm = SimpleNamespace(
        storage=storage,
        transition=RolloutStorage.Transition(),
        actor=network,
        critic=Critic(**vars(network)),
        rnd=None,
        gamma=gamma,
        lam=lam,
        device="cpu",
        normalize_advantage_per_mini_batch=True,
    )
    for t in range(num_steps):
        transition = algorithm.transition
        transition.observations, transition.actions = obs, torch.zeros(num_envs, 2)
        transition.values = data["values"][:, t : t + 1]
        transition.actions_log_prob = torch.zeros(num_envs)
        transition.distribution_params = (torch.zeros(num_envs, 2),)
        extras = {"time_outs": data["truncated"][:, t]} if time_outs else {}
        PPO.process_env_step(algorithm, obs, data["rewards"][:, t], data["dones"][:, t], extras)
    PPO.compute_returns(algorithm, obs)

    how = {"truncated": data["truncated"], "timeout_bootstrap": "stored_value"} if time_outs else {}
    rewards = data["rewards"].clone()
    arguments = (data["rewards"], data["values"], data["dones"], data["last_values"], gamma, lam)
    advantages, returns, stats = gae(*arguments, stats=True, backend=backend, **how)
    assert torch.equal(rewards, data["rewards"])
    assert_close(returns, storage.returns.squeeze(2).t())
    assert_close(advantages, storage.advantages.squeeze(2).t())
    # Its storage is [T, N, 1], used as it is; its rewards already include the bootstrap.
    columns = gae(
        storage.rewards, storage.values, storage.dones, data["last_values"], gamma, lam, time_dim=0, backend=backend
    )
    assert_close(columns[1], storage.returns)
    algorithm.normalize_advantage_per_mini_batch = False
    PPO.compute_returns(algorithm, obs)
    count, mean, m2 = stats
    normalised = (advantages - mean) / ((m2 / (count - 1)).sqrt() + 1e-8)
    assert_close(normalised, storage.advantages.squeeze(2).t())


# ---------------------------------------------------------------------------------------------- errors

X = torch.zeros(3, 5)
SPARSE = X.to_sparse()
INT = torch.zeros(3, 5, dtype=torch.int64)
META = torch.zeros(3, 5, device="meta")
GRAD = torch.zeros(3, 5, requires_grad=True)
ENVS = torch.zeros(3)
FLOAT64 = torch.zeros(3, 5, dtype=torch.float64)


def fresh(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape or (3, 5), **options)


ERRORS = [
    ({"rewards": [1.0]}, TypeError, r"^rewards: expected a tensor, got list$"),
    ({"rewards": torch.zeros(5)}, ValueError, r"^rewards: expected shape \[N, T\].*, got \[5\]$"),
    ({"rewards": torch.zeros(3, 5, 2)}, ValueError, r"^rewards: expected shape \[N, T\].*, got \[3, 5, 2\]$"),
    ({"rewards": torch.zeros(3, 5, 1, 1)}, ValueError, r"^rewards: expected .*got \[3, 5, 1, 1\]$"),
    ({"rewards": INT}, TypeError, r"^rewards: expected a floating dtype, got torch.int64$"),
    ({"rewards": SPARSE}, TypeError, r"^rewards: expected a strided tensor, got torch.sparse_coo$"),
    ({"rewards": GRAD}, RuntimeError, r"^rewards: requires grad.*rewards\.detach\(\)"),
    ({"values": torch.zeros(5, 3)}, ValueError, r"^values: expected shape \[3, 5\], got \[5, 3\]$"),
    ({"values": INT}, TypeError, r"^values: expected a floating dtype, got torch.int64$"),
    ({"values": META}, ValueError, r"^values: expected device cpu, got meta$"),
    ({"values": GRAD}, RuntimeError, r"^values: requires grad.*values\.detach\(\)"),
    ({"values": None}, TypeError, r"^values: expected a tensor, got NoneType$"),
    ({"dones": torch.zeros(5, 3)}, ValueError, r"^dones: expected shape \[3, 5\], got \[5, 3\]$"),
    ({"dones": torch.zeros(3)}, ValueError, r"^dones: expected shape \[3, 5\], got \[3\]$"),
    ({"dones": X.to(torch.complex64)}, TypeError, r"^dones: expected a real dtype, got torch.complex64$"),
    ({"dones": META}, ValueError, r"^dones: expected device cpu, got meta$"),
    (
        {"last_values": torch.zeros(5)},
        ValueError,
        r"^last_values: expected shape \[3\] or \[3, 1\], got \[5\]; rewards are "
        r"read as \[N, T\]: pass time_dim=0 for \[T, N\]$",
    ),
    ({"last_values": torch.zeros(())}, ValueError, r"^last_values: expected shape \[3\] or \[3, 1\], got \[\]$"),
    ({"last_values": torch.zeros(1, 3)}, ValueError, r"^last_values: expected shape \[3\].*, got \[1, 3\]$"),
    ({"last_values": ENVS.long()}, TypeError, r"^last_values: expected a floating dtype, got torch.int64$"),
    ({"last_values": ENVS.to("meta")}, ValueError, r"^last_values: expected device cpu, got meta$"),
    ({"truncated": X}, ValueError, r"^truncated: expected a bootstrap.*final_values, timeout_bootstrap; got none$"),
    (
        {"truncated": X, "final_values": X, "timeout_bootstrap": "next_value"},
        ValueError,
        r"^timeout_bootstrap: expected one bootstrap.*got final_values and timeout_bootstrap$",
    ),
    (
        {"truncated": torch.zeros(3, 4), "final_values": X},
        ValueError,
        r"^truncated: expected shape \[3, 5\], got \[3, 4\]$",
    ),
    ({"truncated": X, "final_values": X[:, :4]}, ValueError, r"^final_values: expected shape \[3, 5\], got \[3, 4\]$"),
    ({"truncated": X, "final_values": INT}, TypeError, r"^final_values: expected a floating dtype, got torch.int64$"),
    ({"final_values": X}, ValueError, r"^final_values: expected truncated with it, got None$"),
    ({"timeout_bootstrap": "last"}, ValueError, r"^timeout_bootstrap: expected None, .*got 'last'$"),
    ({"valid": torch.zeros(2, 5)}, ValueError, r"^valid: expected shape \[3, 5\], got \[2, 5\]$"),
    ({"gamma": math.nan}, ValueError, r"^gamma: expected a number in \[0, 1\], got nan$"),
    ({"gamma": 1.5}, ValueError, r"^gamma: expected a number in \[0, 1\], got 1.5$"),
    ({"gamma": "a"}, TypeError, r"^gamma: expected a number, got str$"),
    ({"lam": math.inf}, ValueError, r"^lam: expected a number in \[0, 1\], got inf$"),
    ({"lam": -0.1}, ValueError, r"^lam: expected a number in \[0, 1\], got -0.1$"),
    ({"lam": None}, TypeError, r"^lam: expected a number, got NoneType$"),
    ({"time_dim": 2}, ValueError, r"^time_dim: expected 0 or 1, got 2$"),
    ({"backend": "tpu"}, ValueError, r"^backend: expected one of reference, cpu, triton, cuda, got 'tpu'$"),
    ({"out": X}, TypeError, r"^out: expected \(advantages, returns\), got Tensor$"),
    ({"out": (fresh(),)}, TypeError, r"^out: expected \(advantages, returns\), got"),
    ({"out": (fresh(), fresh(5, 3))}, ValueError, r"^out\[1\]: expected shape \[3, 5\], got \[5, 3\]$"),
    ({"out": (FLOAT64, fresh())}, TypeError, r"^out\[0\]: expected dtype torch.float32, got torch.float64$"),
    ({"rewards": FLOAT64, "out": (fresh(), fresh())}, TypeError, r"^out\[0\]: expected dtype torch.float64"),
    ({"out": (META, fresh())}, ValueError, r"^out\[0\]: expected device cpu, got meta$"),
    ({"out": (X, fresh())}, ValueError, r"^out\[0\]: expected memory of its own"),
    ({"out": (fresh(), fresh(1, 5).expand(3, 5))}, ValueError, r"^out\[1\]: expected memory of its own"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_errors_name_the_argument(change, error, message):
    arguments = {"rewards": X, "values": X, "dones": X, "last_values": ENVS} | change
    with pytest.raises(error, match=message):
        gae(**arguments)


def test_out_overlapping_something():
    both = torch.zeros(6, 5)
    with pytest.raises(ValueError, match=r"^out\[1\]: expected memory of its own"):
        gae(X, X, X, ENVS, out=(both[:3], both[2:5]))
    flags = fresh()
    for name in ("truncated", "valid"):
        with pytest.raises(ValueError, match=r"^out\[0\]: expected memory of its own"):
            gae(X, X, X, ENVS, timeout_bootstrap="next_value", out=(flags, fresh()), **{name: flags})
    gae(X, X, X, ENVS, out=(both[:3], both[3:]))


def test_a_backend_that_cannot_serve_fails_with_the_reason(monkeypatch):
    reason = pydrone.backends()["cuda"]
    if reason is not None:
        with pytest.raises(RuntimeError, match=r"^backend: 'cuda' cannot be used: ") as raised:
            gae(X, X, X, ENVS, backend="cuda")
        assert reason in str(raised.value)
        monkeypatch.setenv("PYDRONE_BACKEND", "cuda")
        with pytest.raises(RuntimeError, match=r"^PYDRONE_BACKEND: 'cuda' cannot be used: "):
            gae(X, X, X, ENVS)
    monkeypatch.setenv("PYDRONE_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^PYDRONE_BACKEND: expected one of .*got 'fast'"):
        gae(X, X, X, ENVS)
    gae(X, X, X, ENVS, backend="reference")  # the argument takes precedence over the environment variable
    assert pydrone.backends()["reference"] is None


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
@pytest.mark.parametrize("name", ["dones", "truncated", "valid"])
def test_unsigned_flags_work_or_are_refused_by_name(dtype, name, backend):
    flags = torch.tensor([[0, 1, 0, 2, 0]] * 3).to(dtype)
    arguments = {"rewards": X + 1, "values": X, "dones": X, "last_values": ENVS, "timeout_bootstrap": "next_value"}
    try:
        actual = gae(backend=backend, **arguments | {name: flags})
    except TypeError as error:
        assert str(error).startswith(f"{name}: ") and str(dtype) in str(error)
    else:
        expected = gae(backend=backend, **arguments | {name: flags.int()})
        assert torch.equal(actual[0], expected[0])


def test_inputs_that_require_grad_are_taken_under_no_grad():
    with torch.no_grad():
        assert gae(X, GRAD, X, ENVS)[0].requires_grad is False


FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
REALS = FLOATS | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
REALS |= {torch.uint16, torch.uint32, torch.uint64}


@pytest.mark.parametrize(
    "dtype", sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str), ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_backends_take_and_refuse_the_same_dtypes(dtype, backend):
    """Of every argument; what is refused is named, float8 and 4-bit integers too."""
    planes = dict.fromkeys(("rewards", "values", "dones", "truncated", "final_values", "valid"), torch.zeros(3, 2))
    for name, x in (planes | {"last_values": torch.zeros(3)}).items():
        known = REALS if name in ("dones", "truncated", "valid") else FLOATS
        given = planes | {"last_values": torch.zeros(3), name: torch.empty(x.shape, dtype=dtype)}
        if dtype in known:
            gae(**given, backend=backend)
            continue
        with pytest.raises(
            TypeError, match=rf"^{name}: expected (one of|a (floating|real) dtype|a strided).*, got {dtype}$"
        ):
            gae(**given, backend=backend)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("time_dim", [0, 1])
def test_the_other_order_of_time_and_environments_is_recognised(time_dim, column):
    """last_values has the right length; the rewards were meant the other way round."""
    x, last = torch.zeros((7, 4) if time_dim else (4, 7)), torch.zeros((4, 1) if column else 4)
    order, other = ("[N, T]", "[T, N]") if time_dim else ("[T, N]", "[N, T]")
    with pytest.raises(ValueError, match=r"^last_values: expected shape \[7\] or \[7, 1\], got \[4") as error:
        gae(x, x, x, last, time_dim=time_dim)
    assert str(error.value).endswith(f"; rewards are read as {order}: pass time_dim={1 - time_dim} for {other}")
    with pytest.raises(ValueError, match=r"got \[5\]$"):  # fits neither
        gae(x, x, x, torch.zeros(5), time_dim=time_dim)
