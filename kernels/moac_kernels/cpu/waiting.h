// How a thread waits: a hint to the processor while it looks again and again, now and then its core
// for others, who may have been put aside with the task that it waits for, then sleep until another
// one wakes it. Linux has futexes; macOS the same under names of its own.
#pragma once
#include <sched.h>
#include <stdint.h>

static inline void relax() {
#if defined(__aarch64__)
  __asm__ volatile("yield");
#else
  __builtin_ia32_pause();
#endif
}

static inline void give_way() { sched_yield(); }

#if defined(__APPLE__)
extern "C" int __ulock_wait(uint32_t operation, void *word, uint64_t value, uint32_t timeout);
extern "C" int __ulock_wake(uint32_t operation, void *word, uint64_t value);

static inline void sleep_while(int32_t *word, int32_t value) { __ulock_wait(1, word, (uint32_t)value, 0); }
static inline void wake_all(int32_t *word) { __ulock_wake(1 | 0x100, word, 0); }
#else
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline void sleep_while(int32_t *word, int32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
static inline void wake_all(int32_t *word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
#endif
