// What Python hands over: plain structs of 8-byte fields. `moac_runtime/backends/cpu/library.py` mirrors
// them; a change here raises MOAC_ABI there and here.
#pragma once
#include <stdint.h>

#define MOAC_ABI 2

// Weights of one layer, row-major [out, in]; null where the model has none.
struct Layer {
  const void *attn_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias;
  const void *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
};

// Scales of one layer's 8-bit weights, one for each output.
struct Scales {
  const float *qkv, *o, *gate_up, *down;
};

// `bf16`: weights and caches are bfloat16, else float32. `activation`: 0 silu, 1 gelu,
// 2 gelu by tanh, 3 relu. Where there are `scales`, the embedding, the head and every product's
// weights are int8, to be multiplied by them; norms and biases never are. What version 1 of this
// interface has comes first.
struct Model {
  int64_t num_layers, hidden, inner, heads, kv_heads, head_dim, vocab, bf16, activation;
  double norm_eps, rope_scaling;
  const void *embed, *norm, *head;
  const Layer *layers;
  const float *embed_scale, *head_scale;
  const Scales *scales;
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
struct Step {
  const Cache *caches;
  const int64_t *first_cache;
  const float *frequencies;
  const Segment *segments;
  const int64_t *tokens, *wanted, *places;
  int64_t num_segments, num_tokens, num_wanted;
  float *logits;
};
