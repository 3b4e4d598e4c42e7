/* What a Cortex-M4F needs before main, for qemu's netduinoplus2 (an STM32F405, the Crazyflie's processor), with output
   and exit by semihosting. */
#include "board.h"

extern unsigned stack_top, data_from, data_start, data_end, bss_start, bss_end;

int main(void);

static int host(int operation, const void *argument)
{
  register int r0 __asm__("r0") = operation;
  register const void *r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

void board_print(const char *text)
{
  host(0x04, text); /* SYS_WRITE0 */
}

void board_hex(unsigned value)
{
  char text[10];
  int i;
  for (i = 7; i >= 0; --i, value >>= 4) text[i] = "0123456789abcdef"[value & 15u];
  text[8] = '\n';
  text[9] = 0;
  board_print(text);
}

void board_exit(int status)
{
  const unsigned block[2] = {0x20026, (unsigned)status}; /* ADP_Stopped_ApplicationExit */
  host(0x20, block);                                     /* SYS_EXIT_EXTENDED */
  for (;;) {}
}

void reset_handler(void)
{
  unsigned *from = &data_from, *to;
  for (to = &data_start; to < &data_end;) *to++ = *from++;
  for (to = &bss_start; to < &bss_end;) *to++ = 0;
  *(volatile unsigned *)0xe000ed88 |= 0xfu << 20; /* CPACR: the floating-point unit is on */
  __asm__ volatile("dsb\nisb");
  SYSTICK_LOAD = 0xffffff;
  SYSTICK_CONTROL = 5; /* counts the processor's clock, no interrupt */
  board_exit(main());
}

static void fault_handler(void)
{
  board_exit(99);
}

__attribute__((section(".vectors"), used)) static void *const vectors[] = {
  &stack_top, (void *)reset_handler, (void *)fault_handler, (void *)fault_handler,
  (void *)fault_handler, (void *)fault_handler, (void *)fault_handler};
