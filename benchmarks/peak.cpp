// How fast a processor multiplies, in 10^9 multiply-adds a second of all threads, by the kernels' own
// instructions: what products are held against. Built by cpu_sets.py for each instruction set.
//
//   peak THREADS
//
// Prints what weights are multiplied in, and the figure, for float32, bfloat16 and int8.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "whole.h"

constexpr int CHAINS = TILE_ROWS * 2;
constexpr int64_t ROUNDS = 1 << 22;

static double now() {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec + 1e-9 * at.tv_nsec;
}

// Its value must be known here, in a register.
template <class V> static inline void keep(V &value) {
#if defined(__aarch64__)
  __asm__ volatile("" : "+w"(value));
#else
  __asm__ volatile("" : "+v"(value));
#endif
}

template <class A> static void *multiply(void *) {
  static const A ones[W * LANE<A>] = {};
  vec acc[CHAINS], a = vraw(ones), b = vraw(ones);
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) acc[i] = vzero();
  for (int64_t n = 0; n < ROUNDS; n++) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) keep(acc[i] = vdot(acc[i], a, b, A()));
  }
  vec sum = vzero();
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) sum = vadd(sum, acc[i]);
  return vsum(sum) > 1 ? (void *)1 : nullptr;
}

static void *multiply_whole(void *) {
  static const int8_t ones[4 * W] = {1};
  ivec acc[CHAINS], w = iraw(ones);
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) acc[i] = ibegin(0);
  for (int64_t n = 0; n < ROUNDS; n++) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) keep(acc[i] = istep(acc[i], ones, w)), keep(w);
  }
  vec sum = vzero();
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) sum = vadd(sum, vfloat(acc[i]));
  return vsum(sum) > 1e30f ? (void *)1 : nullptr;
}

static void tell(const char *name, void *(*work)(void *), int threads, int lane) {
  pthread_t team[64];
  double best = 1e30;
  for (int repeat = 0; repeat < 3; repeat++) {
    const double begun = now();
    for (int i = 0; i < threads; i++) pthread_create(&team[i], nullptr, work, nullptr);
    for (int i = 0; i < threads; i++) pthread_join(team[i], nullptr);
    const double taken = now() - begun;
    best = taken < best ? taken : best;
  }
  printf("%s %.1f\n", name, 1e-9 * ROUNDS * CHAINS * W * lane * threads / best);
}

int main(int, char **words) {
  const int threads = smaller(64, atoi(words[1]));
  tell("float32", multiply<float>, threads, 1);
  tell("bfloat16", multiply<operand<bf16>>, threads, LANE<operand<bf16>>);
  tell("int8", multiply_whole, threads, 4);
  return 0;
}
