/* Flies an exported hover policy on a Crazyflie 2.x, as an out-of-tree controller of its firmware.
 *
 * policy.h is what `pydrone export RUN --format c` wrote. README.md says how to build this, and what was never flown.
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "FreeRTOS.h"
#include "app.h"
#include "task.h"

#define DEBUG_MODULE "PYDRONE"
#include "controller.h"
#include "debug.h"
#include "log.h"
#include "platform_defaults.h"
#include "policy.h"
#include "supervisor.h"

#if PYDRONE_NUM_OBS != 17 || PYDRONE_NUM_ACTIONS != 4
#error "policy.h: expected a policy of a hover task, with 17 observations and 4 actions"
#endif
#if !defined(PYDRONE_STEP_MICROSECONDS) || PYDRONE_STEP_MICROSECONDS % 1000 != 0
#error "policy.h: expected a known step of whole milliseconds, which the stabilizer loop of 1 kHz can keep"
#endif
#if PYDRONE_MULTIPLY_ADDS > 8000 && !defined(PYDRONE_ALLOW_SLOW)
#error "policy.h: too large a network for the 1 ms that a stabilizer step has; train with --hidden-dims 32 32 32"
#endif
#ifndef CONFIG_ENABLE_THRUST_BAT_COMPENSATED
#error "app-config: CONFIG_ENABLE_THRUST_BAT_COMPENSATED is needed; without it the firmware's motor commands are no forces"
#endif

/* Of pydrone's tasks (pydrone/envs): scales of the observation, and the propellers' speeds and forces. */
#define POSITION_SCALE (1.0f / 3.0f)
#define VELOCITY_SCALE (1.0f / 3.0f)
#define RATE_SCALE 0.31830989f /* 1 / pi */
#define HOVER_RPM 14468.429f
#define RPM_RANGE 0.8f
#define NEWTON_PER_RPM2 3.16e-10f /* Genesis' cf2x, after Foerster (2015) */
#define TRAINED_MASS 0.027f       /* kg */

#define RADIANS 0.017453293f /* per degree */
#define POLICY_STEPS (PYDRONE_STEP_MICROSECONDS / 1000)

/* The policy's propeller that each motor is. Both count from the front right clockwise, seen from above, and the front
   right one turns counterclockwise in both (M1 to M4; propellers 0 to 3 of Genesis' cf2x). */
static const uint8_t propeller[STABILIZER_NR_OF_MOTORS] = {0, 1, 2, 3};

enum { STOPPED = 0, FLYING = 1, REFUSED = 2 };

static struct {
  uint8_t state;
  stabilizerStep_t acted; /* the step that the policy was last run at */
  float target[3];        /* m, world */
  float actions[4];       /* the policy's last ones */
#ifdef PYDRONE_MEMORY
  pydrone_memory memory;
#endif
} self;

static float clipped(float x, float low, float high)
{
  return x < low ? low : (x > high ? high : x);
}

/* Whether the policy can be given this: all of it finite, and the quaternion one of a rotation. */
static bool isUsable(const float target[3], const sensorData_t *sensors, const state_t *state)
{
  const quaternion_t *q = &state->attitudeQuaternion;
  const float length = q->w * q->w + q->x * q->x + q->y * q->y + q->z * q->z;
  const float sum = target[0] + target[1] + target[2] + state->position.x + state->position.y + state->position.z +
                    state->velocity.x + state->velocity.y + state->velocity.z + sensors->gyro.x + sensors->gyro.y +
                    sensors->gyro.z;
  /* A sum is finite only if its terms are; no comparison with NaN is true. */
  return isfinite(sum) && length > 0.9f && length < 1.1f;
}

/* The 17 observations, as pydrone.envs.hover_task.observe has them. The firmware's world and body frames are the
   task's: x forward, y left, z up. Its quaternion turns body vectors into the world; only the Euler angles of
   state->attitude have the inverted pitch of old, and they are not used. */
static void observe(float obs[PYDRONE_NUM_OBS], const float target[3], const sensorData_t *sensors,
                    const state_t *state)
{
  const quaternion_t *q = &state->attitudeQuaternion;
  /* q and -q are one attitude; in training, quaternions began with w = 1. */
  const float sign = q->w < 0.0f ? -1.0f : 1.0f;
  const float w = sign * q->w, x = sign * q->x, y = sign * q->y, z = sign * q->z;
  const float vx = state->velocity.x, vy = state->velocity.y, vz = state->velocity.z;
  /* The velocity from the world into the body: v - 2 w (u x v) + 2 u x (u x v), u = (x, y, z). */
  const float cx = y * vz - z * vy, cy = z * vx - x * vz, cz = x * vy - y * vx;
  const float velocity[3] = {
    vx + 2.0f * (y * cz - z * cy - w * cx),
    vy + 2.0f * (z * cx - x * cz - w * cy),
    vz + 2.0f * (x * cy - y * cx - w * cz),
  };
  int i;
  obs[0] = target[0] - state->position.x;
  obs[1] = target[1] - state->position.y;
  obs[2] = target[2] - state->position.z;
  obs[3] = w;
  obs[4] = x;
  obs[5] = y;
  obs[6] = z;
  /* The gyroscope is in degrees per second. */
  obs[10] = sensors->gyro.x * RADIANS;
  obs[11] = sensors->gyro.y * RADIANS;
  obs[12] = sensors->gyro.z * RADIANS;
  for (i = 0; i < 3; ++i) {
    obs[i] = clipped(obs[i] * POSITION_SCALE, -1.0f, 1.0f);
    obs[7 + i] = clipped(velocity[i] * VELOCITY_SCALE, -1.0f, 1.0f);
    obs[10 + i] = clipped(obs[10 + i] * RATE_SCALE, -1.0f, 1.0f);
  }
  for (i = 0; i < 4; ++i) obs[13 + i] = self.actions[i];
}

/* The motor command, 0 to 1, for an action: the force of the propeller's speed in training, times this vehicle's mass
   over the trained one, as a part of THRUST_MAX, which is the force of command 1. From there on the thrust curve is the
   firmware's own: motorsCompensateBatteryVoltage solves its fit of force against motor voltage (VMOTOR2THRUST0 to 3)
   and divides by the battery's voltage. */
static float command(float action)
{
  const float rpm = (1.0f + RPM_RANGE * action) * HOVER_RPM;
  const float force = NEWTON_PER_RPM2 * rpm * rpm * (CF_MASS / TRAINED_MASS);
  return clipped(force / THRUST_MAX, 0.0f, 1.0f);
}

static void stop(control_t *control)
{
  int i;
  for (i = 0; i < STABILIZER_NR_OF_MOTORS; ++i) control->normalizedForces[i] = 0.0f;
}

static void start(void)
{
  int i;
  for (i = 0; i < 4; ++i) self.actions[i] = 0.0f;
#ifdef PYDRONE_MEMORY
  pydrone_reset(&self.memory);
#endif
  self.state = FLYING;
}

static void fly(const sensorData_t *sensors, const state_t *state)
{
  float obs[PYDRONE_NUM_OBS];
  observe(obs, self.target, sensors, state);
#ifdef PYDRONE_MEMORY
  pydrone_act(&self.memory, obs, self.actions);
#else
  pydrone_act(obs, self.actions);
#endif
}

void controllerOutOfTreeInit(void)
{
  self.state = STOPPED;
}

bool controllerOutOfTreeTest(void)
{
  const int failed = pydrone_self_test();
  if (failed) DEBUG_PRINT("Test vector %d of the policy fails\n", failed);
  return failed == 0;
}

/* Called at 1 kHz. Motors run while the supervisor has the vehicle armed and ready to fly, and the setpoint holds a
   height; a setpoint without x and y keeps those before it, as when the supervisor levels out. Once the estimate is
   unusable the motors stop, until the setpoint ends or the vehicle is disarmed: the policy cannot fly blind. */
void controllerOutOfTree(control_t *control, const setpoint_t *setpoint, const sensorData_t *sensors,
                         const state_t *state, const stabilizerStep_t stabilizerStep)
{
  const bool across = setpoint->mode.x == modeAbs && setpoint->mode.y == modeAbs;
  const bool wanted = supervisorIsArmed() && supervisorCanFly() && setpoint->mode.z == modeAbs;
  bool first = false;
  int i;

  control->controlMode = controlModeForce;
  stop(control);
  if (!wanted) {
    self.state = STOPPED;
    return;
  }
  if (self.state == REFUSED) return;
  if (self.state == STOPPED) {
    if (!across) return;
    start();
    first = true;
  }
  if (across) {
    self.target[0] = setpoint->position.x;
    self.target[1] = setpoint->position.y;
  }
  self.target[2] = setpoint->position.z;
  if (!isUsable(self.target, sensors, state)) {
    DEBUG_PRINT("The state estimate is not usable: motors stop\n");
    self.state = REFUSED;
    return;
  }
  /* The policy acts at the rate that it was trained at; in between its actions hold. */
  if (first || stabilizerStep - self.acted >= POLICY_STEPS) {
    fly(sensors, state);
    self.acted = stabilizerStep;
  }
  for (i = 0; i < STABILIZER_NR_OF_MOTORS; ++i) {
    control->normalizedForces[i] = command(self.actions[propeller[i]]);
  }
}

/* The firmware wants one; nothing runs in it. */
void appMain(void)
{
  for (;;) vTaskDelay(M2T(2000));
}

LOG_GROUP_START(pydrone)
/* 0: stopped, 1: flying, 2: the state estimate was not usable */
LOG_ADD(LOG_UINT8, state, &self.state)
LOG_GROUP_STOP(pydrone)
