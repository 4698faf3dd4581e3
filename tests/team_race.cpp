// The thread team of the CPU kernels, tried hard: more threads than cores, phases of changing size,
// some of no tasks, teams that come and go, and threads put aside around atomic operations.
//
//   team_race PHASES THREADS SEED PATIENCE_S
//
// Exits 0 where every task ran once and after all those of the phase before, 1 with what went wrong.
#include "put_aside.h"
#include "team.h"

constexpr int64_t NUM_PHASES = 6, MOST_TASKS = 24;

// What a step asks for, as the engine holds it: plain memory, to be read with a task in hand.
struct Ask {
  uint64_t number;
  int64_t tasks[NUM_PHASES];
};

static Ask ask;
static uint64_t ran[NUM_PHASES][MOST_TASKS];  // the last step that each task ran in

static void check_ended(int64_t phase, uint64_t number) {
  for (int64_t t = 0; t < ask.tasks[phase]; t++)
    if (ran[phase][t] != number)
      fail("task %ld of phase %ld of step %lu had not run when it was over", t, phase, number);
}

static void run_task(int64_t phase, int64_t task, uint64_t number) {
  if (ask.number != number) fail("step %lu ran a task of step %lu", number, ask.number);
  if (task < 0 || task >= ask.tasks[phase])
    fail("task %ld of %ld in phase %ld of step %lu", task, ask.tasks[phase], phase, number);
  for (int64_t before = 0; before < phase; before++) check_ended(before, number);
  if (ran[phase][task] == number)
    fail("task %ld of phase %ld of step %lu ran twice", task, phase, number);
  ran[phase][task] = number;
  if (!dice.roll(500)) usleep(dice.roll(300));  // long enough for the others to fall asleep
}

static void run(Team &team, uint64_t number) {
  Walk walk{team, number};
  for (int64_t p = 0; p < NUM_PHASES; p++)
    walk.share([&](int64_t task) { run_task(p, task, number); });
}

static int64_t some_tasks() {
  const int64_t few = dice.roll(8);
  return few < 5 ? few / 2 : dice.roll(MOST_TASKS + 1);  // 0, 0, 1, 1, 2 or any
}

static void take_step(Team &team) {
  ask.number = team.step + 1;
  for (int64_t p = 0; p < NUM_PHASES; p++) team.prepare(p, ask.tasks[p] = some_tasks());
  team.begin();
  run(team, team.step);
  for (int64_t p = 0; p < NUM_PHASES; p++) check_ended(p, team.step);
  phases_done += NUM_PHASES;
}

static void serve(Team &team, uint64_t seed, bool quiet) {
  dice.state = seed, calm = quiet;
  for (uint64_t seen = 0; (seen = team.follow(seen)) != CLOSED;) run(team, seen);
}

// A team from its first step to its end. Every other one goes past the 32 bits of a step's number.
static void live(int threads, int64_t steps, uint64_t seed) {
  static Phase phases[NUM_PHASES];
  static Team team;
  memset(phases, 0, sizeof phases);
  memset(ran, 0, sizeof ran);
  the_clock = nullptr;
  team = Team{threads, NUM_PHASES, phases};
  if (seed % 2) team.step = (UINT64_C(1) << 32) - 1 - dice.roll(steps + 1);
  the_clock = &team.clock;
  calm = seed % 5 == 0;
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++)
    others.emplace_back(serve, std::ref(team), seed * 1000 + i, calm);
  for (int64_t s = 0; s < steps; s++) take_step(team);
  team.close();
  for (std::thread &other : others) other.join();
}

int main(int count, char **words) {
  if (count != 5) fail("usage: team_race PHASES THREADS SEED PATIENCE_S");
  const int64_t phases = atoll(words[1]);
  const int threads = atoi(words[2]);
  uint64_t seed = atoll(words[3]);
  dice.state = seed + 1;
  std::thread(watch, atoi(words[4])).detach();
  int64_t teams = 0;
  for (; phases_done < phases; teams++) live(threads, 1 + dice.roll(300), seed++);
  printf("%ld phases, %ld teams of %d threads\n", phases_done.load(), teams, threads);
  fflush(stdout);
  _exit(0);
}
