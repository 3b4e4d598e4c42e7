/* Stand-in for the tests: what the firmware says of a Crazyflie 2.1+ (August 2026). */
#pragma once
#define CONFIG_ENABLE_THRUST_BAT_COMPENSATED 1
#define CF_MASS 0.029f   /* kg */
#define THRUST_MAX 0.12f /* N, per motor */
