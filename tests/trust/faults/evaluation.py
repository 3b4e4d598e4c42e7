"""Mistakes in what an evaluation flies and counts, and in where episodes begin."""

from __future__ import annotations

from .fault import Fault

OF_PROTOCOL = "tests/report/test_protocol.py"
OF_AVERAGE = "tests/ppo/training/test_average.py"
PROTOCOL = "pydrone/report/protocol.py"

EVALUATION = [
    Fault(
        "a crash that does not count against the distance",
        PROTOCOL,
        "final = torch.where(survived, last, math.inf)",
        "final = last[survived]",
        OF_PROTOCOL,
    ),
    Fault(
        "a drone that has settled before it leaves again",
        PROTOCOL,
        "settled_at = (outside * steps).amax(dim=0)",
        "settled_at = outside.long().cumprod(0).sum(0)",
        OF_PROTOCOL,
    ),
    Fault(
        "nominal scenes flown by randomised drones",
        PROTOCOL,
        "task.randomizer.make_nominal(~randomised)",
        "task.randomizer.make_nominal(randomised)",
        OF_PROTOCOL,
    ),
    Fault(
        "velocities of the body taken for those of the world",
        "pydrone/envs/quadrotor.py",
        "self.vel.copy_(rotate(state.quat, state.lin_vel))",
        "self.vel.copy_(state.lin_vel)",
        OF_PROTOCOL,
    ),
    Fault(
        "progress measured from before the drone was placed",
        "pydrone/envs/hover_task.py",
        "        self.last_pos.copy_(state.pos)\n        sensed = state if",
        "        sensed = state if",
        OF_PROTOCOL,
    ),
    Fault(
        "an average that leans to zero in the first iterations",
        "pydrone/ppo/training/average.py",
        'x / average["total"] for',
        "x for",
        OF_AVERAGE,
    ),
    Fault(
        "the last weights exported, the averaged ones evaluated",
        "pydrone/ppo/export.py",
        "weights, settings = deployed(state), ",
        'weights, settings = state["policy"], ',
        OF_AVERAGE,
    ),
    Fault(
        "the same initial state for every episode",
        "pydrone/envs/hover_task.py",
        "(self._draw[:, -1] * len(initial)).long()",
        "(self._draw[:, -1] * 0).long()",
        "tests/envs/test_hover_task.py",
    ),
    Fault(
        "tilted drones that begin an episode at rest, in Genesis' arrays",
        "pydrone/envs/genesis_arrays.py",
        "torch.where(ended, rows[:, 7:13].t(), own.vel, out=own.vel)",
        "own.vel.masked_fill_(ended, 0)",
        "tests/envs/test_genesis.py",
    ),
]
