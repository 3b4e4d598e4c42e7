/* Stand-in for the tests. */
#pragma once
#define M2T(milliseconds) (milliseconds)
