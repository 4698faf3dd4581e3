// What Python hands over: plain structs of 8-byte fields. `moac_runtime/backends/cpu/library.py` mirrors
// them; a change here raises MOAC_ABI there and here.
#pragma once
#include <stdint.h>

#define MOAC_ABI 3

// How the numbers of a matrix lie in memory.
enum WeightFormat : int64_t {
  WEIGHTS_PLAIN = 0,  // of the engine's type
  WEIGHTS_INT8 = 1,   // int8, to be multiplied by a float32 scale for each row
};

// How the keys and values of a cache lie in memory.
enum CacheFormat : int64_t {
  CACHE_PLAIN = 0,  // of the engine's type
};

// Weights [out, in], row-major. `scale`: what the format says, null where it says nothing.
struct Matrix {
  const void *at;
  const float *scale;
  int64_t format;
};

// Weights of one layer; biases and the norms of queries and keys are null where the model has none.
// They are of the engine's type, whatever the matrices' format.
struct Layer {
  const void *attn_norm, *q_norm, *k_norm, *mlp_norm;
  Matrix qkv, o, gate_up, down;
  const void *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
};

// `bf16`: the engine's type is bfloat16, else float32. `activation`: 0 silu, 1 gelu, 2 gelu by tanh,
// 3 relu.
struct Model {
  int64_t num_layers, hidden, inner, heads, kv_heads, head_dim, vocab, bf16, activation;
  double norm_eps, rope_scaling;
  Matrix embed, head;
  const void *norm;
  const Layer *layers;
};

// Keys and values [heads, size, head_dim] of one row and of adjacent KV heads of one span: `first`
// is the first of them, `window` the checkpoint's own (0: none). The row's tokens have places:
// positions without the `shift` that were lost from `gap` on when the cache grew.
struct Cache {
  void *keys, *values;
  int64_t first, heads, size, sink, window, shift, gap, format;
};

// `count` tokens of a row from position `start` on; a step's tokens lie segment after segment. A row
// has caches and RoPE frequencies [head_dim / 2] of its own: `first_cache[layer]` to
// `first_cache[layer + 1]` are the layer's.
struct Segment {
  const Cache *caches;
  const int64_t *first_cache;
  const float *frequencies;
  int64_t start, count;
};

// `wanted`: tokens of the step whose logits are asked for; `places`: the row of logits [., vocab]
// that each goes to.
struct Step {
  const Segment *segments;
  const int64_t *tokens, *wanted, *places;
  int64_t num_segments, num_tokens, num_wanted;
  float *logits;
};

// What moac_open, moac_serves and moac_step return.
enum Status : int64_t {
  DONE = 0,
  SHORT_OF_MEMORY = 1,
  UNKNOWN_FORMAT = 2,  // of weights or of a cache
};
