// Decode attention of one token over caches in bfloat16, 8 and 4 bits, beside the time to read them:
// what a step of batch one spends on keys and values, in turns within one run. Built for an
// instruction set by the flags of `cpu_build.py`:
//
//   g++ -std=c++17 -O3 -pthread FLAGS -I kernels/moac_kernels/cpu benchmarks/kv_widths.cpp
//   ./a.out THREADS TOKENS LAYERS KV_HEADS GROUP HEAD_DIM ROUNDS
//
// Prints for each width its bytes, the least and the median of the rounds' milliseconds, and the least
// time to read as many bytes.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <vector>

#include "attention_codes.h"

typedef operand<bf16> A;
constexpr int64_t PIECE = 512;  // tokens of a task

static double now_ms() {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return 1e3 * at.tv_sec + 1e-6 * at.tv_nsec;
}

static int64_t threads, tokens, heads, group, d;  // heads: of all layers
static std::vector<A> queries;

struct Caches {
  Form form;
  int64_t bytes;  // of a head's keys, or values
  char *memory;   // [heads][keys, values]

  explicit Caches(int64_t format) 
      : form(format, d, sizeof(bf16)), bytes(padded(form.bytes(1, tokens), 64)) {
    memory = (char *)aligned_alloc(64, 2 * heads * bytes);
    std::vector<bf16> x(d);
    for (int64_t half = 0; half < 2 * heads; half++)
      for (int64_t j = 0; j < tokens; j++) {
        const Tokens to = slots(half).skip(j);
        for (int64_t i = 0; i < d; i++) x[i] = narrow_down((float)rand() / RAND_MAX - 0.5f);
        if (form.plain()) memcpy(to.numbers, x.data(), d * sizeof(bf16));
        else write_token(form, x.data(), to);
      }
  }
  Tokens slots(int64_t half) const { return form.slots(memory + half * bytes, 1, tokens, 0); }
};

// One piece of one head.
static void attend(const Caches &of, int64_t task) {
  const int64_t pieces = (tokens + PIECE - 1) / PIECE, head = task / pieces, first = task % pieces * PIECE;
  const int64_t n = smaller(PIECE, tokens - first);
  const Tokens k = of.slots(2 * head).skip(first), v = of.slots(2 * head + 1).skip(first);
  float peak[MOST_GROUP], sum[MOST_GROUP], out[MOST_GROUP * MOST_HEAD_DIM];
  memset(out, 0, group * d * sizeof(float));
  for (int64_t g = 0; g < group; g++) peak[g] = HIDDEN, sum[g] = 0;
  const Partial to = {peak, sum, out};
  const A *q = queries.data();
  if (of.form.plain())
    return attend_one(q, group, d, (const bf16 *)k.numbers, (const bf16 *)v.numbers, d, n, to, 0);
  Asked asked;
  asked.take(q, group, d);
  if (of.form.rotated()) attend_codes<Nibbles>(asked, group, d, k, v, n, to, 0);
  else attend_codes<int8_t>(asked, group, d, k, v, n, to, 0);
}

static volatile float kept;  // so that what is read must be
static void read(const Caches &of, int64_t task) {
  const int64_t pieces = (tokens + PIECE - 1) / PIECE, size = 2 * heads * of.bytes;
  const int64_t part = padded(size / (heads * pieces), 256);
  vec sums[4] = {vzero(), vzero(), vzero(), vzero()};
  for (int64_t at = task * part; at + 16 * W <= smaller(size, (task + 1) * part); at += 16 * W)
    for (int i = 0; i < 4; i++) sums[i] = vmax(sums[i], vload((const float *)(of.memory + at) + i * W));
  const float sum = vsum(vmax(vmax(sums[0], sums[1]), vmax(sums[2], sums[3])));
  kept = sum;
}

typedef void (*Part)(const Caches &, int64_t);
static Part part;
static const Caches *taken;
static int64_t next_task;
static void *work(void *) {
  const int64_t tasks = heads * ((tokens + PIECE - 1) / PIECE);
  for (int64_t task; (task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < tasks;) part(*taken, task);
  return nullptr;
}

static double timed(const Caches &of, Part what) {
  part = what, taken = &of, next_task = 0;
  std::vector<pthread_t> team(threads - 1);
  const double start = now_ms();
  for (pthread_t &thread : team) pthread_create(&thread, nullptr, work, nullptr);
  work(nullptr);
  for (pthread_t thread : team) pthread_join(thread, nullptr);
  return now_ms() - start;
}

int main(int, char **words) {
  threads = atoll(words[1]), tokens = atoll(words[2]), heads = atoll(words[3]) * atoll(words[4]);
  group = atoll(words[5]), d = atoll(words[6]);
  const int64_t rounds = atoll(words[7]);
  queries.resize(group * d);
  for (A &x : queries) {
    const float value = (float)rand() / RAND_MAX - 0.5f;
    if constexpr (sizeof(A) == sizeof(bf16)) x = narrow_down(value);
    else x = value;
  }
  const Caches caches[] = {Caches(CACHE_PLAIN), Caches(CACHE_INT8), Caches(CACHE_INT4)};
  std::vector<double> took[3], reading[3];
  for (int64_t round = 0; round <= rounds; round++)
    for (int i = 0; i < 3; i++) {
      const double a = timed(caches[i], attend), b = timed(caches[i], read);
      if (round) took[i].push_back(a), reading[i].push_back(b);
    }
  const char *names[] = {"bfloat16", "8", "4"};
  for (int i = 0; i < 3; i++) {
    std::sort(took[i].begin(), took[i].end());
    std::sort(reading[i].begin(), reading[i].end());
    printf("%-9s %6.1f MB  attention %6.2f ms (median %6.2f)  read %6.2f ms\n", names[i],
           2 * heads * caches[i].bytes / 1e6, took[i][0], took[i][rounds / 2], reading[i][0]);
  }
}
