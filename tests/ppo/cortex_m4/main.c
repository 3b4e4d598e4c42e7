/* Runs an exported policy on the rows of inputs.h and prints the bits of its actions, after its self-test, the
   instructions of a call and its stack, all in hexadecimal. */
#include <errno.h>
#include "board.h"
#include "inputs.h"
#ifndef EMPTY
#include "policy.h"
#endif

#define PAINT 0xa5a5a5a5u

#define PAINTED 4096u /* words */

const float *row;
float actions[4];

#ifdef EMPTY
/* All that the other program has besides the policy: errno too, a kilobyte of newlib that any program shares. */
int main(void)
{
  row = inputs[errno];
  actions[0] = row[0];
  board_hex((unsigned)actions[0]);
  return 0;
}
#else
static __attribute__((noinline)) void call(void)
{
  pydrone_act(row, actions);
#ifdef NOPS /* so many more instructions */
#define TEXT(x) #x
#define TIMES(x) ".rept " TEXT(x) "\nnop\n.endr"
  __asm__ volatile(TIMES(NOPS));
#endif
}

static __attribute__((noinline)) void nothing(void)
{
  __asm__ volatile("" ::: "memory");
}

static __attribute__((noinline)) unsigned ticks(void (*function)(void))
{
  unsigned before, after;
  SYSTICK_NOW = 0; /* reloads */
  before = SYSTICK_NOW;
  function();
  after = SYSTICK_NOW;
  return (before - after) & 0xffffffu;
}

/* Bytes of the stack below this function that `function` writes to. */
static __attribute__((noinline)) unsigned stack(void (*function)(void))
{
  volatile unsigned *sp, *x;
  __asm__ volatile("mov %0, sp" : "=r"(sp));
  for (x = sp - PAINTED; x < sp; ++x) *x = PAINT;
  function();
  for (x = sp - PAINTED; x < sp && *x == PAINT;) ++x;
  return (unsigned)(sp - x) * 4u;
}

int main(void)
{
  int k, i;
  board_hex((unsigned)pydrone_self_test());
  row = inputs[0];
  ticks(nothing);
  board_hex(ticks(nothing));
  board_hex(ticks(call));
  board_hex(stack(call));
  for (k = 0; k < ROWS; ++k) {
    row = inputs[k];
    call();
    for (i = 0; i < PYDRONE_NUM_ACTIONS; ++i) {
      union { float value; unsigned bits; } x;
      x.value = actions[i];
      board_hex(x.bits);
    }
  }
  return 0;
}
#endif
