// For the tests of the thread team: threads are put aside before and after atomic operations of
// the sources included after this file, and its clock may never go back.
#pragma once
#include <immintrin.h>
#include <inttypes.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

template <class... Values> [[noreturn]] static void fail(const char *format, Values... values) {
  fprintf(stderr, format, values...);
  fputc('\n', stderr);
  _exit(1);
}

struct Dice {
  uint64_t state;
  uint64_t roll(uint64_t sides) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (state >> 11) % sides;
  }
};
static thread_local Dice dice{1};
static thread_local bool calm = false;

static void put_aside() {
  if (calm || dice.roll(16)) return;
  if (dice.roll(64)) sched_yield();
  else usleep(dice.roll(200));
}
template <class V> static V then_aside(V value) { return put_aside(), value; }

static const uint64_t *the_clock = nullptr;  // of the team at hand

template <class A, class V> static void store(A *at, V value, int order) {
  if ((const void *)at == the_clock && (uint64_t)value < *the_clock)
    fail("the clock went back from %lu to %lu", *the_clock, (uint64_t)value);
  put_aside();
  __atomic_store_n(at, value, order);
  put_aside();
}

#define __atomic_store_n(at, value, order) store(at, value, order)
#define __atomic_load_n(...) then_aside(__atomic_load_n(__VA_ARGS__))
#define __atomic_add_fetch(...) (put_aside(), then_aside(__atomic_add_fetch(__VA_ARGS__)))
#define __atomic_sub_fetch(...) (put_aside(), then_aside(__atomic_sub_fetch(__VA_ARGS__)))
#define __atomic_compare_exchange_n(...) (put_aside(), then_aside(__atomic_compare_exchange_n(__VA_ARGS__)))

static std::atomic<int64_t> phases_done{0};

// A step that never ends is a failure too.
static void watch(int patience) {
  for (int64_t before = -1, now;; before = now) {
    sleep(patience);
    now = phases_done;
    if (now == before) fail("a hang: nothing ended in %d seconds after %ld phases", patience, now);
  }
}
