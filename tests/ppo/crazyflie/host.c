/* Runs the controller on a host: each line of the standard input is a stabilizer step, each line of the output what came
   of it.

   In: step armed canFly mode.x mode.y mode.z, target x y z (m), position x y z (m), quaternion x y z w, velocity x y z
   (m/s, world), gyro x y z (deg/s).
   Out: controlMode state normalizedForces[4] obs[17], the last ones as `observe` has them before the step. */
#include <stdio.h>

#include "pydrone_controller.c"

static int armed, ready;

bool supervisorIsArmed(void)
{
  return armed;
}

bool supervisorCanFly(void)
{
  return ready;
}

void vTaskDelay(unsigned ticks)
{
  (void)ticks;
}

int main(void)
{
  control_t control = {0};
  setpoint_t setpoint = {0};
  sensorData_t sensors = {0};
  state_t state = {0};
  unsigned step;
  int x, y, z, i;
  float obs[PYDRONE_NUM_OBS], t[3];

  controllerOutOfTreeInit();
  if (!controllerOutOfTreeTest()) return 1;
  while (scanf("%u %d %d %d %d %d", &step, &armed, &ready, &x, &y, &z) == 6) {
    quaternion_t *q = &state.attitudeQuaternion;
    setpoint.mode.x = (stab_mode_t)x;
    setpoint.mode.y = (stab_mode_t)y;
    setpoint.mode.z = (stab_mode_t)z;
    if (scanf("%f %f %f", &t[0], &t[1], &t[2]) != 3) return 2;
    setpoint.position.x = t[0];
    setpoint.position.y = t[1];
    setpoint.position.z = t[2];
    if (scanf("%f %f %f", &state.position.x, &state.position.y, &state.position.z) != 3) return 3;
    if (scanf("%f %f %f %f", &q->x, &q->y, &q->z, &q->w) != 4) return 4;
    if (scanf("%f %f %f", &state.velocity.x, &state.velocity.y, &state.velocity.z) != 3) return 5;
    if (scanf("%f %f %f", &sensors.gyro.x, &sensors.gyro.y, &sensors.gyro.z) != 3) return 6;
    observe(obs, t, &sensors, &state);
    for (i = 0; i < 4; ++i) control.normalizedForces[i] = -1.0f; /* has to be written */
    control.controlMode = controlModeLegacy;
    controllerOutOfTree(&control, &setpoint, &sensors, &state, step);
    printf("%d %d", (int)control.controlMode, (int)self.state);
    for (i = 0; i < 4; ++i) printf(" %.9g", (double)control.normalizedForces[i]);
    for (i = 0; i < PYDRONE_NUM_OBS; ++i) printf(" %.9g", (double)obs[i]);
    printf("\n");
    fflush(stdout);
  }
  return 0;
}
