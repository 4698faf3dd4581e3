// Whole steps of the CPU kernels by many threads, put aside around atomic operations: prefills of
// ragged rows, then tokens one by one, whose attention is cut into pieces. The logits must be those
// of one thread, to rounding: how many pieces there are follows from the threads.
//
//   engine_race ROUNDS THREADS SEED PATIENCE_S
#include "put_aside.h"

#include "engine.cpp"

constexpr int64_t LAYERS = 2, SIZE = 32, INNER = 48, HEADS = 4, KV_HEADS = 2, DIM = 16;
constexpr int64_t EXPERTS = 5, CHOSEN = 2;  // of the second layer
constexpr int64_t VOCAB = 48, ROWS = 3, SPAN = 160, SINK = 4, PROMPT = 150, STEPS = 30;
constexpr int64_t WIDTH = (HEADS + 2 * KV_HEADS) * DIM;

typedef std::vector<float> Floats;

static Floats some_floats(int64_t count) {
  Floats made(count + 16);
  for (float &value : made) value = (float)dice.roll(2001) / 1000 - 1;
  return made;
}

// A model of random weights, as Python would hand it over.
struct Made {
  std::vector<Floats> held;
  std::vector<Layer> layers;
  Model model{};
  const std::vector<double> scalings = std::vector<double>(DIM / 2, 1.0);

  const float *take(int64_t count) { return held.emplace_back(some_floats(count)).data(); }
  Matrix matrix(int64_t count) { return {take(count), nullptr, WEIGHTS_PLAIN}; }

  Made() {
    for (int64_t l = 0; l < LAYERS; l++) {
      Layer layer{};
      layer.attn_norm = take(SIZE), layer.mlp_norm = take(SIZE);
      layer.qkv = matrix(WIDTH * SIZE), layer.o = matrix(SIZE * HEADS * DIM);
      const int64_t mlps = l ? EXPERTS : 1;
      layer.gate_up = matrix(mlps * 2 * INNER * SIZE), layer.down = matrix(mlps * SIZE * INNER);
      layer.inner = INNER, layer.norm_eps = 1e-5, layer.query_scale = 1 / sqrt((double)DIM);
      layer.activation_slope = 1;
      if (l) layer.experts = EXPERTS, layer.chosen = CHOSEN, layer.router = take(EXPERTS * SIZE);
      if (l) layer.sink_logits = take(HEADS);
      layers.push_back(layer);
    }
    model.num_layers = LAYERS, model.hidden = SIZE, model.inner = CHOSEN * INNER;
    model.heads = HEADS, model.kv_heads = KV_HEADS, model.head_dim = DIM, model.vocab = VOCAB;
    model.norm_eps = 1e-5;
    model.embedding_scale = model.residual_scale = model.logit_scale = 1;
    model.num_ropes = 1, model.rope_scalings = scalings.data();
    model.layers = layers.data(), model.norm = take(SIZE);
    model.embed = model.head = matrix(VOCAB * SIZE);
  }
};

// A row's caches, one a KV head; spans and frequencies are its own.
struct Row {
  Floats memory, frequencies;
  std::vector<Cache> caches;
  std::vector<int64_t> first_cache;

  explicit Row(int64_t number) : frequencies(DIM / 2, 0.1f + 0.01f * number) {
    const int64_t span = SPAN - 16 * number;
    memory.resize(2 * LAYERS * KV_HEADS * span * DIM);
    float *at = memory.data();
    for (int64_t l = 0; l < LAYERS; l++)
      for (int64_t head = 0; head < KV_HEADS; head++, at += 2 * span * DIM)
        caches.push_back({at, at + span * DIM, head, 1, span, SINK, 0, 0, 0, CACHE_PLAIN});
    for (int64_t l = 0; l <= LAYERS; l++) first_cache.push_back(l * KV_HEADS);
  }
};

// Some rows, and the steps over them.
struct Rows {
  std::vector<Row> rows;
  Floats logits = Floats(ROWS * VOCAB);

  Rows() {
    rows.reserve(ROWS);  // caches point into a row's memory
    for (int64_t row = 0; row < ROWS; row++) rows.emplace_back(row);
  }

  // `counts` tokens more of each row, the last one's logits of each.
  void take(Handle *handle, const int64_t *starts, const int64_t *counts) {
    std::vector<Segment> segments;
    std::vector<int64_t> tokens, wanted, places;
    for (int64_t row = 0; row < ROWS; row++) {
      const Row &at = rows[row];
      segments.push_back({at.caches.data(), at.first_cache.data(), at.frequencies.data(),
                          starts[row], counts[row]});
      for (int64_t i = 0; i < counts[row]; i++)
        tokens.push_back((7 * (starts[row] + i) + row) % VOCAB);
      wanted.push_back(tokens.size() - 1), places.push_back(row);
    }
    const Step step{segments.data(), tokens.data(), wanted.data(), places.data(),
                    ROWS, (int64_t)tokens.size(), ROWS, logits.data()};
    if (moac_step(handle, &step) != DONE) fail("memory is short");
    phases_done++;
  }
};

// The logits of every step, by so many threads.
static Floats run(const Model &model, int threads, uint64_t seed) {
  Handle *handle;
  if (moac_open(&model, threads, &handle) != DONE) fail("memory is short");
  the_clock = &((Engine<float> *)handle->engine)->team.clock;
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++)
    others.emplace_back([=] {
      dice.state = seed * 1000 + i;
      moac_serve(handle, i);
    });
  Rows rows;
  Floats found;
  int64_t starts[ROWS] = {0}, counts[ROWS];
  for (int64_t s = 0; s < STEPS; s++) {
    for (int64_t row = 0; row < ROWS; row++) counts[row] = s ? 1 : PROMPT - 3 * row;
    rows.take(handle, starts, counts);
    for (int64_t row = 0; row < ROWS; row++) starts[row] += counts[row];
    found.insert(found.end(), rows.logits.begin(), rows.logits.end());
  }
  moac_close(handle);
  for (std::thread &other : others) other.join();
  the_clock = nullptr;
  moac_free(handle);
  return found;
}

static void check_close(const Floats &found, const Floats &wanted) {
  for (size_t i = 0; i < wanted.size(); i++)
    if (!(fabsf(found[i] - wanted[i]) <= 1e-4f * (1 + fabsf(wanted[i]))))
      fail("logit %zu is %g, of one thread %g", i, found[i], wanted[i]);
}

int main(int count, char **words) {
  if (count != 5) fail("usage: engine_race ROUNDS THREADS SEED PATIENCE_S");
  dice.state = atoll(words[3]) + 1;
  std::thread(watch, atoi(words[4])).detach();
  const Made made;
  const Floats wanted = run(made.model, 1, 1);
  for (int64_t round = 1; round <= atoll(words[1]); round++)
    check_close(run(made.model, atoi(words[2]), round), wanted);
  printf("%ld steps\n", phases_done.load());
  fflush(stdout);
  _exit(0);
}
