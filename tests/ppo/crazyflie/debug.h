/* Stand-in for the tests. */
#pragma once
#include <stdio.h>
#define DEBUG_PRINT(...) fprintf(stderr, __VA_ARGS__)
