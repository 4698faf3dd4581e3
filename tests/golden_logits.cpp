// A decoder without options, as Llama is, from a file of plain numbers to logits: for instruction
// sets that this host runs in an emulator alone, where there is no Python.
//
//   golden_logits MODEL LOGITS DECODED THREADS
//
// MODEL holds, as int64: layers, hidden, inner, heads, kv_heads, head_dim, vocab, bf16, tied, tokens,
// then the formats of embed, qkv, o, gate_up, down, lm_head; the tokens; of each layer the number of
// its caches, and of each cache first, heads, size, sink, format. Then float32 frequencies and eps, then for
// each tensor its bytes as int64 and itself: embed, of each layer attn_norm, qkv, o, mlp_norm,
// gate_up, down, then norm and, unless tied, lm_head; each matrix with its scales after it (no bytes
// where it has none). All tokens but the last DECODED are one step; float32 logits of every token go
// to LOGITS.
#include <pthread.h>
#include <stdio.h>

#include <vector>

#include "engine.cpp"

static FILE *file;

template <class V> static std::vector<V> read_some(int64_t count) {
  std::vector<V> found(count);
  if (count && fread(found.data(), sizeof(V), count, file) != (size_t)count) exit(2);
  return found;
}
static int64_t read_one() { return read_some<int64_t>(1)[0]; }

static const void *tensor() {
  const int64_t bytes = read_one();
  if (!bytes) return nullptr;
  void *memory = aligned_alloc(64, padded(bytes, 64));
  if (fread(memory, 1, bytes, file) != (size_t)bytes) exit(2);
  return memory;
}
static Matrix matrix(int64_t format) {
  const void *at = tensor();
  return {at, tensor(), format};
}

static Handle *handle;
static void *serve(void *index) {
  moac_serve(handle, (int64_t)index);
  return nullptr;
}

int main(int, char **words) {
  file = fopen(words[1], "rb");
  const int64_t decoded = atoll(words[3]), threads = atoll(words[4]);
  Model model = {};
  model.num_layers = read_one(), model.hidden = read_one(), model.inner = read_one();
  model.heads = read_one(), model.kv_heads = read_one(), model.head_dim = read_one();
  model.vocab = read_one(), model.bf16 = read_one();
  const int64_t tied = read_one(), count = read_one(), itemsize = model.bf16 ? 2 : 4;
  const std::vector<int64_t> formats = read_some<int64_t>(6), tokens = read_some<int64_t>(count);
  std::vector<int64_t> first_cache = {0};
  std::vector<Cache> caches;
  for (int64_t l = 0; l < model.num_layers; l++) {
    for (int64_t i = read_one(); i; i--) {
      const std::vector<int64_t> c = read_some<int64_t>(5);
      const Form form(c[4], model.head_dim, itemsize);
      const int64_t bytes = form.bytes(c[1], c[2]);
      caches.push_back({allocate(bytes), allocate(bytes), c[0], c[1], c[2], c[3], 0, 0, 0, c[4]});
    }
    first_cache.push_back(caches.size());
  }
  const std::vector<float> frequencies = read_some<float>(model.head_dim / 2);
  const double eps = read_some<float>(1)[0];
  const std::vector<double> scalings(frequencies.size(), 1);
  model.num_ropes = 1, model.rope_scalings = scalings.data(), model.norm_eps = eps;
  model.embedding_scale = model.residual_scale = model.logit_scale = 1;
  model.embed = matrix(formats[0]);
  std::vector<Layer> layers(model.num_layers);
  for (Layer &layer : layers) {
    layer = {};
    layer.inner = model.inner, layer.norm_eps = eps;
    layer.query_scale = 1 / sqrt((double)model.head_dim), layer.activation_slope = 1;
    layer.attn_norm = tensor(), layer.qkv = matrix(formats[1]), layer.o = matrix(formats[2]);
    layer.mlp_norm = tensor(), layer.gate_up = matrix(formats[3]), layer.down = matrix(formats[4]);
  }
  model.layers = layers.data();
  model.norm = tensor();
  model.head = tied ? model.embed : matrix(formats[5]);
  if (moac_open(&model, threads, &handle) != DONE) return 3;
  std::vector<pthread_t> team(threads - 1);
  for (int64_t i = 1; i < threads; i++) pthread_create(&team[i - 1], nullptr, serve, (void *)i);

  std::vector<float> logits(count * model.vocab);
  std::vector<int64_t> places(count);
  for (int64_t i = 0; i < count; i++) places[i] = i;
  for (int64_t at = 0; at < count;) {
    const int64_t fed = at ? 1 : count - decoded;
    Segment segment = {caches.data(), first_cache.data(), frequencies.data(), at, fed};
    Step step = {&segment, tokens.data() + at, places.data(), places.data(),
                 1, fed, fed, logits.data() + at * model.vocab};
    if (moac_step(handle, &step) != DONE) return 4;
    at += fed;
  }
  moac_close(handle);
  for (pthread_t thread : team) pthread_join(thread, nullptr);
  moac_free(handle);
  FILE *out = fopen(words[2], "wb");
  fwrite(logits.data(), sizeof(float), logits.size(), out);
  return fclose(out);
}
