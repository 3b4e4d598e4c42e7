/* Stand-in for the tests. */
#pragma once
void vTaskDelay(unsigned ticks);
