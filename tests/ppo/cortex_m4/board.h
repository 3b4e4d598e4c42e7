/* The board of startup.c. */
#define SYSTICK_CONTROL (*(volatile unsigned *)0xe000e010)
#define SYSTICK_LOAD (*(volatile unsigned *)0xe000e014)
#define SYSTICK_NOW (*(volatile unsigned *)0xe000e018) /* counts down */

void board_print(const char *text);
void board_hex(unsigned value);
void board_exit(int status);
