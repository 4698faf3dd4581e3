// What Python hands over: plain structs of 8-byte fields. `moac_runtime/backends/cpu/library.py` mirrors
// them; a change here raises MOAC_ABI there and here.
#pragma once
#include <stdint.h>

#define MOAC_ABI 2

// Weights of one layer, row-major [out, in]; null where the layer has none: a norm that is null
// leaves what it would norm as it is. Then the layer's options. `inner`: width of its MLP.
// `activation`: 0 silu, 1 gelu, 2 gelu by tanh, 3 relu. `rope`: which rotary table, -1 none.
// `plus_one`: norms multiply by 1 + weight. `wide_qk_norm`: queries and keys are normed across all
// heads, not head by head. `query_scale` multiplies scores, which are then capped by
// `logit_cap` (0: they are not).
struct Layer {
  const void *attn_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias;
  const void *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
  const void *attn_post_norm, *mlp_post_norm;
  int64_t inner, activation, rope, plus_one, wide_qk_norm;
  double norm_eps, query_scale, logit_cap;
};

// Scales of one layer's 8-bit weights, one for each output.
struct Scales {
  const float *qkv, *o, *gate_up, *down;
};

// `inner`: the widest layer's. `bf16`: weights and caches are bfloat16, else float32. A matrix
// that has a scale, here or in `scales`, is int8, to be multiplied by it; norms and biases never
// are. `norm_eps`, `plus_one`: of the last norm. `rope_scalings`: of each of `num_ropes` rotary
// tables, the factor on cos and sin. `embedding_scale`, `residual_scale`, `logit_scale` multiply
// the embedding, what a sublayer adds, and logits, which are then capped by `logit_cap` (0: not).
struct Model {
  int64_t num_layers, hidden, inner, heads, kv_heads, head_dim, vocab, bf16;
  double norm_eps;
  const void *embed, *norm, *head;
  const Layer *layers;
  const float *embed_scale, *head_scale;
  const Scales *scales;
  int64_t num_ropes, plus_one;
  const double *rope_scalings;
  double embedding_scale, residual_scale, logit_scale, logit_cap;
};

// Keys and values [rows, heads, size, head_dim] of adjacent KV heads of one span: `first` is the
// first of them, `window` the checkpoint's own (0: none). A row's tokens have places: positions
// without the `shifts[row]` that were lost from `gaps[row]` on when the cache grew.
struct Cache {
  void *keys, *values;
  int64_t first, heads, size, sink, window;
  const int64_t *shifts, *gaps;
};

// `count` tokens of a row from position `start` on; a step's tokens lie segment after segment.
struct Segment {
  int64_t row, start, count;
};

// `first_cache[layer]` to `first_cache[layer + 1]`: the layer's caches. `wanted`: tokens of the
// step whose logits are asked for; `places`: the row of logits [., vocab] that each goes to.
// `frequencies` [num_ropes, head_dim / 2].
struct Step {
  const Cache *caches;
  const int64_t *first_cache;
  const float *frequencies;
  const Segment *segments;
  const int64_t *tokens, *wanted, *places;
  int64_t num_segments, num_tokens, num_wanted;
  float *logits;
};
