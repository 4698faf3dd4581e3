// Weights of 4 bits. A row is BLOCKs of 64 numbers in 32 bytes: the low half of a byte is a number of
// the block's first GROUP, the high half the one as far into the second. Each group has a scale and
// an offset in bfloat16, side by side: weight = scale * number + offset.
#pragma once
#include "whole.h"

struct Packed {
  const uint8_t *numbers;  // [rows][blocks][BLOCK / 2]
  const bf16 *pairs;       // [rows][groups][2]
};

// Scales and offsets of W groups from `pairs` on.
static inline vec pair_scales(const bf16 *pairs) {
  return vfirst_halves(vraw((const float *)pairs));
}
static inline vec pair_offsets(const bf16 *pairs) {
  return vsecond_halves(vraw((const float *)pairs));
}

// c[r][q] = a[r] . w[q] for R tokens from `row` on and Q rows of weights from row n on.
template <int R, int Q>
static inline void packed_dots(const Rounded &a, int64_t row, const Packed &w, int64_t n, float *c,
                               int64_t ldc) {
  const int64_t blocks = a.blocks(), groups = a.groups();
  const uint8_t *numbers = w.numbers + n * blocks * (BLOCK / 2);
  const bf16 *pairs = w.pairs + n * groups * 2;
  vec acc[R][Q], offset[R][Q];
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) acc[r][q] = offset[r][q] = vzero();
  alignas(64) float scales[R][Q][W];
  auto add = [&](int64_t group, int64_t count) {  // groups whose scales stand ready
    for (int64_t b = group / 2; b < (group + count) / 2; b++)
#pragma GCC unroll 8
      for (int q = 0; q < Q; q++) {
        const uint8_t *from = numbers + (q * blocks + b) * (BLOCK / 2);
        __builtin_prefetch(from + AHEAD);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          acc[r][q] = ipacked_block(acc[r][q], a.numbers + ((row + r) * blocks + b) * BLOCK, from,
                                    scales[r][q] + 2 * b - group);
      }
  };
  int64_t g = 0;
  for (; g + W <= groups; g += W) {
    for (int q = 0; q < Q; q++) {
      const bf16 *at = pairs + (q * groups + g) * 2;
      const vec scale = pair_scales(at), shift = pair_offsets(at);
      for (int r = 0; r < R; r++) {
        const int64_t place = (row + r) * groups + g;
        vstore(scales[r][q], vmul(scale, vload(a.scales + place)));
        offset[r][q] = vfma(shift, vload(a.offsets + place), offset[r][q]);
      }
    }
    add(g, W);
  }
  float rest[R][Q] = {};
  for (int q = 0; q < Q; q++)
    for (int r = 0; r < R; r++)
      for (int64_t i = g; i < groups; i++) {
        const bf16 *pair = pairs + (q * groups + i) * 2;
        scales[r][q][i - g] = widen(pair[0]) * a.scales[(row + r) * groups + i];
        rest[r][q] += widen(pair[1]) * a.offsets[(row + r) * groups + i];
      }
  add(g, groups - g);
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++)
      c[r * ldc + q] = vsum(vadd(acc[r][q], offset[r][q])) + rest[r][q];
}

// c [m][columns] where tokens are few, for columns from `first` on.
static void packed_few(const Rounded &a, int64_t m, const Packed &w, int64_t first, int64_t columns,
                       float *c, int64_t ldc) {
  for (int64_t n = 0; n < columns; n += 2) {
    const bool two = columns - n >= 2;
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) {
      float *to = c + r * ldc + n;
      if (two) packed_dots<4, 2>(a, r, w, first + n, to, ldc);
      else packed_dots<4, 1>(a, r, w, first + n, to, ldc);
    }
    for (; r < m; r++) {
      float *to = c + r * ldc + n;
      if (two) packed_dots<1, 2>(a, r, w, first + n, to, ldc);
      else packed_dots<1, 1>(a, r, w, first + n, to, ldc);
    }
  }
}

// `count` weights of a row from place `from`, a multiple of BLOCK, on, at most to its end, as numbers
// of type P: `row` and `groups` are of the matrix.
template <class P>
static void unpack(const Packed &w, int64_t row, int64_t groups, int64_t from, int64_t count, P *to) {
  const uint8_t *numbers = w.numbers + (row * groups * GROUP + from) / 2;
  const bf16 *pairs = w.pairs + (row * groups + from / GROUP) * 2;
  for (int64_t i = 0; i < count; i += GROUP) {
    alignas(64) float group[GROUP];
    const int shift = i / GROUP % 2 ? 4 : 0;
    const uint8_t *bytes = numbers + i / BLOCK * (BLOCK / 2);
    const float scale = widen(pairs[i / GROUP * 2]), offset = widen(pairs[i / GROUP * 2 + 1]);
    for (int64_t j = 0; j < GROUP; j++) group[j] = scale * (float)(bytes[j] >> shift & 15) + offset;
    for (int64_t j = 0; j < smaller(GROUP, count - i); j += W) vstore(to + i + j, vload(group + j));
  }
}
