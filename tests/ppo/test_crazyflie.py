"""examples/crazyflie: the controller, compiled against stand-ins of the firmware's headers, and called as by it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pydrone.envs import quadrotor
from pydrone.envs.contract import Contract
from pydrone.envs.drone import DroneState, rotate_inverse
from pydrone.envs.hover_task import Constants, HoverConfig, observe
from pydrone.ppo import export
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.make import make_policy

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "crazyflie"
FLAGS = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wdouble-promotion", "-Wno-unused-parameter"]
FORCE_MODE, STOPPED, FLYING, REFUSED = 2, 0, 1, 2
# Of the stand-in platform_defaults.h.
MASS, MOST = 0.029, 0.12

LEVEL = {"armed": 1, "ready": 1, "modes": (1, 1, 1), "target": (0.0, 0.0, 1.0), "pos": (0.0, 0.0, 1.0)}
LEVEL |= {"quat": (0.0, 0.0, 0.0, 1.0), "vel": (0.0, 0.0, 0.0), "gyro": (0.0, 0.0, 0.0)}


class Controller:
    """The program of the controller with a policy."""

    def __init__(self, policy: torch.nn.Module, folder: Path, *flags: str, dt: float | None = 0.01) -> None:
        if shutil.which("gcc") is None:
            pytest.skip("there is no gcc to compile the controller with")
        shutil.copyfile(EXAMPLE / "src" / "pydrone_controller.c", folder / "pydrone_controller.c")
        shutil.copyfile(HERE / "crazyflie" / "host.c", folder / "host.c")
        export.save(policy, folder / "policy.h", "c", (-1.0, 1.0), contract=Contract("", dt))
        program = folder / "controller"
        command = ["gcc", *FLAGS, *flags, f"-I{HERE / 'crazyflie'}", folder / "host.c", "-o", program, "-lm"]
        built = subprocess.run(command, capture_output=True, text=True, timeout=300)
        self.error = built.stderr
        if built.returncode == 0:
            self.process = subprocess.Popen(
                [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )

    def step(self, number: int, **changes: object) -> tuple[int, int, np.ndarray, np.ndarray]:
        """One stabilizer step: the control mode, the controller's state, the motors' commands, the observation."""
        x = LEVEL | changes
        numbers = [number, x["armed"], x["ready"], *x["modes"]]
        floats = [*x["target"], *x["pos"], *x["quat"], *x["vel"], *x["gyro"]]
        self.process.stdin.write(" ".join([*map(str, numbers), *(f"{v:.9g}" for v in floats)]) + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline().split()
        values = np.array([float(v) for v in said[2:]])
        return int(said[0]), int(said[1]), values[:4], values[4:]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def pilot() -> ActorCritic:
    """A policy without hidden layers that flies to the target by proportional and derivative terms."""
    made = ActorCritic(17, 4, ())
    tilt, gains = np.zeros((2, 17)), np.zeros((4, 17))  # wanted roll and pitch, rad; collective, roll, pitch, yaw
    # Observations are 1/3 of metres and metres a second, and 1/pi of radians a second; angles are twice the quaternion.
    tilt[0, 1], tilt[0, 8] = -0.41 * 3, 0.41 * 3
    tilt[1, 0], tilt[1, 7] = 0.41 * 3, -0.41 * 3
    gains[0, 2], gains[0, 9] = 0.57 * 3, -0.38 * 3
    gains[1:3] = 0.17 * tilt
    gains[1, 4], gains[1, 10] = -0.17 * 2, -0.0226 * math.pi
    gains[2, 5], gains[2, 11] = -0.17 * 2, -0.0226 * math.pi
    gains[3, 6], gains[3, 12] = -0.066 * 2, -0.033 * math.pi
    mixer = [[1, np.sign(y), -np.sign(x), spin] for (x, y), spin in zip(quadrotor.PROPELLERS, quadrotor.SPIN)]
    with torch.no_grad():
        made.actor[0].weight.copy_(torch.tensor(np.array(mixer) @ gains))
        made.actor[0].weight[:, 13:].copy_(0.05 * torch.eye(4))  # its last actions matter a little
        made.actor[0].bias.zero_()
    return made


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    made = Controller(pilot(), tmp_path_factory.mktemp("crazyflie"))
    assert not made.error, made.error
    yield made
    made.close()


@pytest.fixture
def stopped(controller) -> Controller:
    """The controller before a flight."""
    assert controller.step(0, armed=0)[1] == STOPPED
    return controller


def random_states(count: int) -> tuple[torch.Tensor, DroneState]:
    """Targets [N, 3] and states, some so far or so fast that observations are clipped."""
    draw = torch.Generator().manual_seed(2)
    quat = torch.nn.functional.normalize(torch.randn(count, 4, generator=draw), dim=-1)
    quat = quat * quat[:, :1].sign()
    state = DroneState(
        1.5 * torch.randn(count, 3, generator=draw),
        quat,
        2 * torch.randn(count, 3, generator=draw),
        3 * torch.randn(count, 3, generator=draw),
    )
    return torch.randn(count, 3, generator=draw), state


def as_firmware(state: DroneState, world: torch.Tensor, i: int, sign: float = 1.0) -> dict[str, list[float]]:
    """A state as the firmware's estimator gives it: world velocities, degrees, the quaternion's w last."""
    w, x, y, z = (sign * state.quat[i]).tolist()
    gyro = (state.ang_vel[i].double() * 180 / math.pi).tolist()
    return {"pos": state.pos[i].tolist(), "quat": [x, y, z, w], "vel": world[i].tolist(), "gyro": gyro}


def world_velocity(state: DroneState) -> torch.Tensor:
    """[N, 3], by the rotation matrix of the quaternion, whose columns are the body's axes."""
    w, x, y, z = state.quat.double().unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    world = (matrix @ state.lin_vel.double().unsqueeze(-1)).squeeze(-1)
    back = rotate_inverse(state.quat.double(), world)
    torch.testing.assert_close(back, state.lin_vel.double(), rtol=0, atol=1e-5)  # lengths are 1 in float32
    return world


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["q", "-q"])
def test_the_observations_are_the_tasks(sign, stopped):
    count = 40
    target, state = random_states(count)
    wanted = observe(state, target, torch.zeros(count, 4), Constants.of(HoverConfig()))
    clipped = (wanted[:, :3].abs() == 1).float().mean(), (wanted[:, 7:13].abs() == 1).float().mean()
    assert all(0.02 < share < 0.6 for share in clipped)
    world = world_velocity(state)
    for i in range(count):
        got = stopped.step(0, armed=0, target=target[i].tolist(), **as_firmware(state, world, i, sign))[3]
        np.testing.assert_allclose(got[:13], wanted[i, :13].numpy(), rtol=0, atol=2e-6)


def test_the_policy_runs_at_each_tenth_step_and_sees_its_last_actions(stopped):
    policy, target = pilot(), torch.tensor([[0.3, -0.2, 1.1]])
    last = torch.zeros(1, 4)
    commands = []
    for number in range(5, 45):
        pos = torch.tensor([[0.01 * number, 0.0, 1.0]])
        upright = DroneState(pos, torch.tensor([[1.0, 0, 0, 0]]), torch.zeros(1, 3), torch.zeros(1, 3))
        obs = observe(upright, target, last, Constants.of(HoverConfig()))
        mode, state, command, _ = stopped.step(number, target=target[0].tolist(), pos=pos[0].tolist())
        assert (mode, state) == (FORCE_MODE, FLYING)
        if (number - 5) % 10 == 0:
            last = policy.mean(obs).detach().clamp(-1, 1)
            # The force of the propeller's speed, for this mass, as a part of what command 1 means.
            rpm = (1 + 0.8 * last[0].double().numpy()) * 14468.429
            wanted = np.clip(3.16e-10 * rpm**2 * MASS / 0.027 / MOST, 0, 1)
        np.testing.assert_allclose(command, wanted, rtol=0, atol=2e-6)
        commands.append(tuple(command))
    assert len(set(commands)) == 4


def test_actions_of_zero_carry_the_weight(stopped):
    force = stopped.step(1)[2] * MOST
    assert force.sum() == pytest.approx(MASS * 9.81, rel=2e-3)
    # More than the motors have is not asked for.
    assert stopped.step(11, target=(0.0, 0.0, 4.0))[2].max() == 1


@pytest.mark.parametrize(
    "change",
    [
        {"armed": 0},
        {"ready": 0},
        {"modes": (1, 1, 0)},
        {"modes": (1, 1, 2)},
        {"modes": (0, 1, 1)},
        {"modes": (1, 0, 1)},
    ],
    ids=str,
)
def test_motors_stand_still_unless_it_may_fly(change, stopped):
    for number in range(1, 25):
        mode, state, command, _ = stopped.step(number, **change)
        assert (mode, state) == (FORCE_MODE, STOPPED) and not command.any()
    assert stopped.step(25)[2].all()


@pytest.mark.parametrize("change", [{"armed": 0}, {"ready": 0}, {"modes": (0, 0, 0)}], ids=str)
def test_a_flight_ends_at_once_and_the_next_one_begins_anew(change, stopped):
    first = [stopped.step(number, target=(0.5, 0.0, 1.0))[2] for number in range(1, 12)]
    assert first[0].all()
    assert not stopped.step(12, **change)[2].any()
    again = stopped.step(13, target=(0.5, 0.0, 1.0))
    assert again[1] == FLYING and np.array_equal(again[2], first[0]), "with no last actions"


def test_without_x_and_y_it_stays_where_it_was_to_be(stopped):
    """As where the supervisor levels out."""
    said = []
    for change in ({}, {"modes": (0, 0, 1), "target": (9.0, 9.0, 1.0)}):
        stopped.step(0, armed=0)
        stopped.step(1, target=(0.5, 0.2, 1.0))
        said.append(stopped.step(11, **{"target": (0.5, 0.2, 1.0)} | change))
    assert said[1][1] == FLYING and np.array_equal(said[0][2], said[1][2])


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "change",
    [
        {"pos": (0.0, NAN, 1.0)},
        {"pos": (0.0, INF, 1.0)},
        {"vel": (NAN, 0.0, 0.0)},
        {"vel": (0.0, 0.0, -INF)},
        {"gyro": (0.0, INF, 0.0)},
        {"quat": (0.0, 0.0, NAN, 1.0)},
        {"quat": (0.0, 0.0, 0.0, 0.0)},
        {"quat": (0.0, 0.0, 0.0, 2.0)},
        {"target": (NAN, 0.0, 1.0)},
    ],
    ids=str,
)
def test_an_estimate_that_is_not_usable_is_refused(change, stopped):
    assert stopped.step(1)[2].all()
    # Between two runs of the policy, too.
    assert stopped.step(2, **change)[1] == REFUSED
    for number in range(3, 25):
        mode, state, command, _ = stopped.step(number)
        assert (mode, state) == (FORCE_MODE, REFUSED) and not command.any(), "it stays refused"
    assert stopped.step(25, armed=0)[1] == STOPPED
    assert stopped.step(26)[1] == FLYING


def fly(controller: Controller, seconds: float, pos, quat, vel, gyro, target) -> list[np.ndarray]:
    """A rigid body under the controller, by the firmware's own motor geometry; returns its positions each 10 ms.

    The torques are those that the firmware's power distribution inverts (M1 front right and counterclockwise, M2 rear
    right, M3 rear left, M4 front left); quaternions (w, x, y, z), rad/s.
    """
    arm, to_torque, inertia = 0.046 * math.sqrt(0.5), 0.007, np.array([16.57e-6, 16.66e-6, 29.26e-6])
    pos, quat, vel, gyro = (np.array(x, dtype=float) for x in (pos, quat, vel, gyro))
    path, h = [], 1e-3
    for number in range(round(seconds / h)):
        w, x, y, z = quat
        said = controller.step(number, target=target, pos=pos, quat=(x, y, z, w), vel=vel, gyro=np.degrees(gyro))
        m1, m2, m3, m4 = said[2] * MOST
        torque = np.array([arm * (m3 + m4 - m1 - m2), arm * (m2 + m3 - m1 - m4), to_torque * (m2 + m4 - m1 - m3)])
        up = np.array([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])
        vel = vel + h * (up * (m1 + m2 + m3 + m4) / MASS - np.array([0, 0, 9.81]))
        pos = pos + h * vel
        gyro = gyro + h * (torque - np.cross(gyro, inertia * gyro)) / inertia
        p, q, r = gyro
        quat = quat + h / 2 * np.array(
            [-x * p - y * q - z * r, w * p + y * r - z * q, w * q + z * p - x * r, w * r + x * q - y * p]
        )
        quat /= np.linalg.norm(quat)
        if number % 10 == 0:
            path.append(np.concatenate((pos, quat)))
    return path


@pytest.mark.parametrize(
    ("quat", "gyro", "target"),
    [
        ((1, 0, 0, 0), (0, 0, 0), (0.4, -0.3, 1.2)),
        ((0.966, 0.259, 0, 0), (0, 0, 0), (0.0, 0.0, 1.0)),
        ((0.966, 0, -0.259, 0), (1, -2, 0.5), (0.0, 0.5, 1.0)),
        ((0.95, 0, 0, 0.312), (0, 0, 1), (0.3, 0.0, 1.0)),  # turned by 36 degrees
    ],
    ids=["aside", "rolled", "pitched", "yawed"],
)
def test_it_flies_to_its_target_with_the_firmwares_motors(quat, gyro, target, stopped):
    path = fly(stopped, 5.0, (0.0, 0.0, 1.0), quat, (0.2, -0.1, 0.0), gyro, target)
    assert np.linalg.norm(path[-1][:3] - target) < 0.03
    assert abs(path[-1][6]) < 0.05 and path[-1][3] > 0.99, "yaw is 0 again"


def test_policies_that_do_not_fit_do_not_compile(tmp_path):
    def said(policy: torch.nn.Module, *flags: str, dt: float | None = 0.01) -> str:
        made = Controller(policy, tmp_path, *flags, dt=dt)
        if not made.error:
            made.close()
        return made.error

    assert "with 17 observations and 4 actions" in said(ActorCritic(16, 4, (4,)))
    assert "a known step of whole milliseconds" in said(ActorCritic(17, 4, (4,)), dt=None)
    assert "a known step of whole milliseconds" in said(ActorCritic(17, 4, (4,)), dt=0.0025)
    assert "too large a network" in said(ActorCritic(17, 4, (128, 128)))
    assert not said(ActorCritic(17, 4, (128, 128)), "-DPYDRONE_ALLOW_SLOW")
    assert not said(make_policy({"policy": 17}, 4, PPOConfig(recurrent="gru", rnn_dim=8, hidden_dims=(8,)), None))


def test_what_the_example_says_of_the_task_is_true():
    """Its constants are copies."""
    source = (EXAMPLE / "src" / "pydrone_controller.c").read_text()
    found = dict(re.findall(r"#define (\w+) ([^/\n]+?)f?(?: +/\*.*)?\n", source))

    config = HoverConfig()
    assert float(found["HOVER_RPM"]) == config.hover_rpm and float(found["RPM_RANGE"]) == config.rpm_range
    assert float(found["NEWTON_PER_RPM2"]) == quadrotor.KF and float(found["TRAINED_MASS"]) == quadrotor.MASS
    assert float(found["RATE_SCALE"]) == pytest.approx(config.ang_vel_scale, rel=1e-7)
