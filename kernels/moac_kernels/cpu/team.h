// Threads that take the same steps: each phase's tasks are claimed one by one, and nobody starts
// the next phase before all have ended this one. The threads themselves come from Python.
#pragma once
#include <immintrin.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr int STEP_SPINS = 4000;     // tens of microseconds: a phase is shorter
constexpr int IDLE_SPINS = 20000;    // between steps Python chooses a token

struct Team {
  int threads;
  alignas(64) int32_t arrived = 0;
  alignas(64) int32_t generation = 0;
  alignas(64) int32_t sleepers = 0;
  alignas(64) int64_t next = 0;

  // The next task of the phase; tasks are numbered from 0.
  int64_t claim() {
    return threads == 1 ? next++ : __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
  }

  void barrier(int spins = STEP_SPINS) {
    if (threads == 1) {
      next = 0;
      return;
    }
    int32_t now = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      arrived = 0;
      next = 0;
      __atomic_store_n(&generation, now + 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &generation, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
      return;
    }
    for (int i = 0; i < spins; i++) {
      if (__atomic_load_n(&generation, __ATOMIC_ACQUIRE) != now) return;
      _mm_pause();
    }
    __atomic_add_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&generation, __ATOMIC_SEQ_CST) == now)
      syscall(SYS_futex, &generation, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
    __atomic_sub_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
  }
};
