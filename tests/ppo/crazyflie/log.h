/* Stand-in for the tests: logs nothing. */
#pragma once
#define LOG_UINT8 1
#define LOG_GROUP_START(name) void *const logged_##name[] = {
#define LOG_ADD(type, name, address) address,
#define LOG_GROUP_STOP(name) };
