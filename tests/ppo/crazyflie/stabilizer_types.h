/* Stand-in, written for the tests from the firmware's public interface: the members that the controller uses. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef uint32_t stabilizerStep_t;

typedef struct { float x, y, z; } Axis3f;
typedef struct { uint32_t timestamp; float x, y, z; } point_t;
typedef point_t velocity_t;
typedef struct { uint32_t timestamp; float roll, pitch, yaw; } attitude_t;
typedef struct { float x, y, z, w; } quaternion_t;

typedef struct { Axis3f acc, gyro; } sensorData_t;
typedef struct {
  attitude_t attitude;
  quaternion_t attitudeQuaternion;
  point_t position;
  velocity_t velocity;
} state_t;

typedef enum { modeDisable = 0, modeAbs, modeVelocity } stab_mode_t;
typedef struct {
  point_t position;
  struct { stab_mode_t x, y, z, roll, pitch, yaw, quat; } mode;
} setpoint_t;

#define STABILIZER_NR_OF_MOTORS 4
typedef enum { controlModeLegacy = 0, controlModeForceTorque = 1, controlModeForce = 2 } control_mode_t;
typedef struct {
  union {
    struct { int16_t roll, pitch, yaw; float thrust; };
    float normalizedForces[STABILIZER_NR_OF_MOTORS];
  };
  control_mode_t controlMode;
} control_t;
