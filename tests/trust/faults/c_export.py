"""Mistakes in the exported C header, and in the Crazyflie's controller that flies it."""

from __future__ import annotations

from .fault import Fault

HEADER = "pydrone/ppo/exporting/c_header.py"
EXPORT = "pydrone/ppo/export.py"
CONTRACT = "pydrone/envs/contract.py"
CONTROLLER = "examples/crazyflie/src/pydrone_controller.c"
OF_C = "tests/ppo/test_export_c.py"
OF_EXPORT = "tests/ppo/test_export.py"
OF_CONTROLLER = "tests/ppo/test_crazyflie.py"

C_EXPORT = [
    Fault("float16 without its sign, in C", HEADER, "0x8fffffffu", "0x0fffffffu", OF_C),
    Fault(
        "the update gate the wrong way round, in C",
        HEADER,
        "(1.0f - z) * n + z * h[i]",
        "(1.0f - z) * h[i] + z * n",
        OF_EXPORT,
    ),
    Fault(
        "the first of discrete actions taken for 0, in C",
        HEADER,
        "return best + {int(given[0])};",
        "return best;",
        OF_EXPORT,
    ),
    Fault(
        "a self-test that NaN passes",
        HEADER,
        "if (!(fabsf(actions[i] - expected[k][i]) <= {_number(SELF_TEST_TOLERANCE)} * scale)) ",
        "if (fabsf(actions[i] - expected[k][i]) > {_number(SELF_TEST_TOLERANCE)} * scale) ",
        OF_C,
    ),
    Fault(
        "float16's actions compared with the unrounded policy's, and not said",
        EXPORT,
        "policy is original else",
        "policy is not None else",
        OF_C,
    ),
    Fault(
        "a header that is not run before it is put in place",
        EXPORT,
        "        if opened is not None:\n",
        '        if opened is not None and format != "c":\n',
        OF_C,
    ),
    Fault(
        "a policy refused for rounding alone",
        EXPORT,
        "C_TOLERANCE, ORDERS = 1e-6, 8",
        "C_TOLERANCE, ORDERS = 1e-6, 0",
        OF_C,
    ),
    Fault(
        "the velocity's scale in the contract that of the position",
        CONTRACT,
        '"m/s", "body frame", constants["lin_vel_scale"]',
        '"m/s", "body frame", constants["pos_scale"]',
        OF_C,
    ),
    Fault("quaternions with w last in the contract", CONTRACT, 'f"w{AXES}"', 'f"{AXES}w"', OF_C),
    Fault(
        "the velocity turned the wrong way",
        CONTROLLER,
        "vx + 2.0f * (y * cz - z * cy - w * cx)",
        "vx + 2.0f * (y * cz - z * cy + w * cx)",
        OF_CONTROLLER,
    ),
    Fault(
        "the velocity left in the world's frame",
        CONTROLLER,
        "clipped(velocity[i] * VELOCITY_SCALE",
        "clipped((&state->velocity.x)[i] * VELOCITY_SCALE",
        OF_CONTROLLER,
    ),
    Fault(
        "the pitch rate of the firmware's Euler angles",
        CONTROLLER,
        "sensors->gyro.y * RADIANS",
        "-sensors->gyro.y * RADIANS",
        OF_CONTROLLER,
    ),
    Fault(
        "degrees taken for radians", CONTROLLER, "#define RADIANS 0.017453293f", "#define RADIANS 1.0f", OF_CONTROLLER
    ),
    Fault("-q taken for another attitude than q", CONTROLLER, "q->w < 0.0f ? -1.0f : 1.0f", "1.0f", OF_CONTROLLER),
    Fault("motors in counterclockwise order", CONTROLLER, "= {0, 1, 2, 3}", "= {0, 3, 2, 1}", OF_CONTROLLER),
    Fault(
        "the rate of the loop for the policy's",
        CONTROLLER,
        "if (first || stabilizerStep - self.acted >= POLICY_STEPS)",
        "if (first || stabilizerStep - self.acted >= 1)",
        OF_CONTROLLER,
    ),
    Fault(
        "motors that turn unarmed",
        CONTROLLER,
        "supervisorIsArmed() && supervisorCanFly()",
        "supervisorCanFly()",
        OF_CONTROLLER,
    ),
    Fault(
        "a second flight with the first one's last actions",
        CONTROLLER,
        "self.actions[i] = 0.0f;",
        "(void)i;",
        OF_CONTROLLER,
    ),
    Fault(
        "an infinite estimate clipped to a bound",
        CONTROLLER,
        "return isfinite(sum) && length",
        "return sum == sum && length",
        OF_CONTROLLER,
    ),
    Fault(
        "a refusal that ends by itself",
        CONTROLLER,
        "if (self.state == REFUSED) return;",
        "if (self.state == REFUSED) self.state = FLYING;",
        OF_CONTROLLER,
    ),
    Fault(
        "thrust linear in the propeller's speed",
        CONTROLLER,
        "NEWTON_PER_RPM2 * rpm * rpm *",
        "NEWTON_PER_RPM2 * HOVER_RPM * rpm *",
        OF_CONTROLLER,
    ),
    Fault("the trained mass for the vehicle's", CONTROLLER, "* (CF_MASS / TRAINED_MASS)", "* 1.0f", OF_CONTROLLER),
]
