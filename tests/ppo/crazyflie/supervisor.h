/* Stand-in, written for the tests from the firmware's public interface. */
#pragma once
#include <stdbool.h>

bool supervisorIsArmed(void);
bool supervisorCanFly(void);
