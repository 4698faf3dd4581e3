// Mixtures of experts: where the tokens of a step go, and their rows grouped by expert, so that each
// expert's weights are read once, and those of experts that nobody chose never.
#pragma once
#include <math.h>
#include <string.h>

#include "matmul.h"

// The `chosen` largest of `count` logits, the first of equals first, and what each counts: its share
// of the softmax over all, or, `normalised`, over those alone.
static inline void choose(const float *logits, int64_t count, int64_t chosen, bool normalised,
                          int64_t *expert, float *share) {
  int64_t held = 0;
  for (int64_t e = 0; e < count; e++) {
    int64_t at = held < chosen ? held++ : chosen;
    for (; at > 0 && logits[e] > logits[expert[at - 1]]; at--)
      if (at < chosen) expert[at] = expert[at - 1];
    if (at < chosen) expert[at] = e;
  }
  const float top = logits[expert[0]];
  float all = 0, own = 0;
  for (int64_t e = 0; e < count; e++) all += expf(logits[e] - top);
  for (int64_t c = 0; c < chosen; c++) own += share[c] = expf(logits[expert[c]] - top);
  for (int64_t c = 0; c < chosen; c++) share[c] /= normalised ? own : all;
}

// A step's tokens in one layer's mixture. An item is a token and an expert it chose; items lie
// expert after expert, and those of an expert in the order of the tokens.
template <class A> struct Mixture {
  float *logits, *share;  // [tokens][experts], [tokens][chosen]: of the router
  int64_t *expert, *place;  // [tokens][chosen]: which experts, and which items these are
  int64_t *first;         // [experts + 1]: where an expert's items begin
  int64_t *token;         // [items]
  float *weight;          // [items]
  uint8_t *lone;          // [items]: what the engine says of each item's token
  int64_t *used;          // the experts that have items, `num_used` of them
  A *rows;                // [items][hidden]: what each item's token hands over
  int64_t num_used;

  // Group what all tokens chose; their `expert` and `share` stand ready.
  void group(int64_t tokens, int64_t experts, int64_t chosen) {
    memset(first, 0, (experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < tokens * chosen; i++) first[expert[i] + 1]++;
    num_used = 0;
    for (int64_t e = 0; e < experts; e++) {
      if (first[e + 1]) used[num_used++] = e;
      first[e + 1] += first[e];
    }
    for (int64_t i = 0; i < tokens * chosen; i++) {
      const int64_t item = first[expert[i]]++;  // for now where the next goes
      place[i] = item, token[item] = i / chosen, weight[item] = share[i];
    }
    for (int64_t e = experts; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
  }

  // Copy a token's row [hidden] to where its items lie.
  void hand_over(int64_t m, int64_t chosen, const A *row, int64_t hidden, bool alone) {
    for (int64_t i = m * chosen; i < (m + 1) * chosen; i++) {
      memcpy(rows + place[i] * hidden, row, hidden * sizeof(A));
      lone[place[i]] = alone;
    }
  }
};
