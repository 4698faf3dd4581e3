// What Python hands over: plain structs of 8-byte fields. `moac_runtime/backends/cpu/library.py` mirrors
// them; a change here raises MOAC_ABI there and here.
#pragma once
#include <stdint.h>

#define MOAC_ABI 5

// How the numbers of a matrix lie in memory.
enum WeightFormat : int64_t {
  WEIGHTS_PLAIN = 0,  // of the engine's type
  WEIGHTS_INT8 = 1,   // int8, to be multiplied by a float32 scale for each row
  WEIGHTS_INT4 = 2,   // two a byte; scale and offset in bfloat16 for each group (packed.h)
};

// How the keys and values of a cache lie in memory.
enum CacheFormat : int64_t {
  CACHE_PLAIN = 0,  // of the engine's type
  CACHE_INT8 = 1,   // int8; a scale in bfloat16 for each token and head (codes.h)
  CACHE_INT4 = 2,   // two a byte, rotated; scale and minimum in bfloat16 for each group of a token
};

// Weights [out, in], row-major. `scale`: what the format says, null where it says nothing.
struct Matrix {
  const void *at, *scale;
  int64_t format;
};

// Weights of one layer. Norms and biases are of the engine's type, whatever the matrices' format,
// and null where the layer has none: a norm that is null leaves what it would norm as it is.
// Then the layer's options. `inner`: width of its MLP. `activation`: 0 silu, 1 gelu, 2 gelu by
// tanh, 3 relu. `rope`: which rotary table, -1 none. `plus_one`: norms multiply by 1 + weight.
// `centred`: they are layer norms. `parallel`: the MLP takes what attention takes.
// `wide_qk_norm`: queries and keys are normed across all heads, not head by head. `query_scale`
// multiplies scores, which are then capped by `logit_cap` (0: they are not). `sink_logits` [heads]:
// of each query head, one that stands in its softmax beside the scores.
// `experts`: how many MLPs there are, 0 for one that every token goes through. Then `gate_up` and
// `down` are those of all, one under the other, and a token goes through the `chosen` whose products
// with `router` [experts, hidden], of the engine's type, are largest; `normalised`: what they count
// adds up to one. MLPs: the gate is cut to at most `mlp_limit`, up to within it (0: they are not);
// the activation is activation(slope x) / slope by `activation_slope`; 1 + up stands for up by
// `up_plus_one`.
struct Layer {
  const void *attn_norm, *q_norm, *k_norm, *mlp_norm, *attn_post_norm, *mlp_post_norm;
  const void *attn_norm_bias, *mlp_norm_bias, *attn_post_norm_bias, *mlp_post_norm_bias;
  Matrix qkv, o, gate_up, down;
  const void *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
  const void *router, *router_bias, *sink_logits;
  int64_t inner, activation, rope, plus_one, centred, wide_qk_norm, parallel;
  int64_t experts, chosen, normalised, up_plus_one;
  double norm_eps, query_scale, logit_cap, activation_slope, mlp_limit;
};

// `inner`: the widest layer's, of all chosen experts together. `bf16`: the engine's type is bfloat16,
// else float32. `plus_one`, `centred`, `norm_eps`: of the last norm. `embedding_scale`,
// `residual_scale`, `logit_scale` multiply the embedding, what a sublayer adds, and logits, which are
// then capped by `logit_cap` (0: not).
// `rope_scalings` [num_ropes, head_dim / 2]: of each rotary table, the factors on cos and sin.
struct Model {
  int64_t num_layers, hidden, inner, heads, kv_heads, head_dim, vocab, bf16, num_ropes, plus_one, centred;
  double norm_eps, embedding_scale, residual_scale, logit_scale, logit_cap;
  Matrix embed, head;
  const void *norm, *norm_bias;
  const double *rope_scalings;
  const Layer *layers;
};

// Keys and values [heads, size, head_dim] of one row and of adjacent KV heads of one span and format:
// `first` is the first of them, `window` the checkpoint's own (0: none). The row's tokens have places:
// positions without the `shift` that were lost from `gap` on when the cache grew. Where they are
// rounded, the numbers of all heads are followed by the scales of all, each head's padded to
// KV_ALIGNMENT bytes.
struct Cache {
  void *keys, *values;
  int64_t first, heads, size, sink, window, shift, gap, format;
};

// `count` tokens of a row from position `start` on; a step's tokens lie segment after segment. A row
// has caches and RoPE frequencies [num_ropes, head_dim / 2] of its own: `first_cache[layer]` to
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
