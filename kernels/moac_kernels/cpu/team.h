// Threads that share a step's tasks. A step is a row of phases, each a number of tasks, some of
// none; a phase begins when every task of the one before it has ended. Nobody waits for a thread,
// only for tasks: one that the system put aside while it had none costs nothing, and finds out
// later what went on without it. So what belongs to a step is read with a task in hand, and never
// without: a task counts as in hand until it is added to `done`, and for whoever adds the last
// one until the clock is moved. The threads themselves come from Python.
#pragma once
#include <stdint.h>

#include "waiting.h"

// How often a waiting thread looks before it sleeps. Tests define less, so that more of them sleep.
#ifndef PHASE_SPINS
#define PHASE_SPINS 2000  // tens of microseconds: most phases are shorter
#define IDLE_SPINS 20000  // between steps Python chooses a token
#endif
constexpr int LOOKS = 50;  // before a core is offered to whoever else can run: a microsecond or two

constexpr int64_t NONE = -1;
constexpr uint64_t CLOSED = 0;  // the first step is 1

// `open`: the step's number in the high half, tasks not yet claimed in the low half. The high half
// has 32 bits of it: a thread would have to be put aside for as many steps to take one for another.
struct alignas(64) Phase {
  uint64_t open;
  int64_t total, done;
};

struct Team {
  int threads;
  int64_t num_phases;
  Phase *phases;
  bool closing = false;
  alignas(64) uint64_t step = 0;   // the newest
  alignas(64) uint64_t clock = 0;  // phases ended: those of step n are n * num_phases and on
  alignas(64) int32_t bell = 0;
  alignas(64) int32_t sleepers = 0;

  // Make ready phase p of the next step; nobody has a task in hand meanwhile.
  void prepare(int64_t p, int64_t tasks) {
    phases[p].total = tasks;
    phases[p].done = 0;
    __atomic_store_n(&phases[p].open, (step + 1) << 32 | (uint64_t)tasks, __ATOMIC_RELEASE);
  }

  void begin() {
    const uint64_t number = step + 1;
    advance(number, 0);  // before anybody can end a phase, which moves the clock further
    __atomic_store_n(&step, number, __ATOMIC_SEQ_CST);
    ring();
  }

  // The phases of a step before `phase` have ended, and so have those of no tasks that follow. Only
  // for whoever ended the last of them: nobody else can move the clock until it has moved.
  void advance(uint64_t number, int64_t phase) {
    while (phase < num_phases && !phases[phase].total) phase++;
    __atomic_store_n(&clock, number * num_phases + phase, __ATOMIC_SEQ_CST);
  }

  // Send everybody home, once the last step has ended.
  void close() {
    __atomic_store_n(&closing, true, __ATOMIC_SEQ_CST);
    __atomic_store_n(&step, step + 1, __ATOMIC_SEQ_CST);
    ring();
  }

  // Wait for a step after `seen`: the newest then, or CLOSED.
  uint64_t follow(uint64_t seen) {
    wait(&step, seen + 1, IDLE_SPINS);
    const uint64_t newest = __atomic_load_n(&step, __ATOMIC_SEQ_CST);
    // after the step: whoever sees that of close(), which nobody ends, sees this too
    return __atomic_load_n(&closing, __ATOMIC_SEQ_CST) ? CLOSED : newest;
  }

  void ring() {
    __atomic_add_fetch(&bell, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) wake_all(&bell);
  }

  // Until `word` is at least `value`.
  void wait(const uint64_t *word, uint64_t value, int spins) {
    for (int i = 0; i < spins; i++) {
      if (__atomic_load_n(word, __ATOMIC_ACQUIRE) >= value) return;
      relax();
      if (i % LOOKS == LOOKS - 1) give_way();
    }
    for (;;) {
      const int32_t heard = __atomic_load_n(&bell, __ATOMIC_SEQ_CST);
      __atomic_add_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(word, __ATOMIC_SEQ_CST) < value) sleep_while(&bell, heard);
      __atomic_sub_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(word, __ATOMIC_ACQUIRE) >= value) return;
    }
  }
};

// One thread on its way through the phases of one step.
struct Walk {
  Team &team;
  const uint64_t step;
  int64_t phase = 0;

  // A task of the phase, NONE where all are claimed or the step is over.
  int64_t claim() {
    Phase &at = team.phases[phase];
    uint64_t open = __atomic_load_n(&at.open, __ATOMIC_ACQUIRE);
    while (open >> 32 == (step & 0xffffffff) && (uint32_t)open)
      if (__atomic_compare_exchange_n(&at.open, &open, open - 1, true, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE))
        return at.total - (int64_t)(uint32_t)open;
    return NONE;
  }

  // The task claimed last has ended.
  void finish() {
    Phase &at = team.phases[phase];
    const int64_t total = at.total;  // once its task is counted, a later step may stand here
    if (__atomic_add_fetch(&at.done, 1, __ATOMIC_ACQ_REL) < total) return;
    team.advance(step, phase + 1);
    team.ring();
  }

  void next() {
    phase++;
    team.wait(&team.clock, step * team.num_phases + phase, PHASE_SPINS);
  }

  // do_task(task) for the tasks of the phase that this thread gets, then on to the next phase.
  template <class Task> void share(Task do_task) {
    for (int64_t task; (task = claim()) != NONE; finish()) do_task(task);
    next();
  }
};
