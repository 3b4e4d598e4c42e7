/* Stand-in for the tests. */
#pragma once
void appMain(void);
