// Attention of one query token over keys and values of 8 and 4 bits, in whole numbers: a token's
// queries, and the weights of a block, are rounded to 15 bits, which bfloat16 is far coarser than,
// and taken as two digits of 8. Sums of what shares a scale are exact.
#pragma once
#include "attention.h"
#include "codes.h"
#include "whole.h"

constexpr float MOST_DIGITS = 127 * 128 + 63, MOST_WEIGHT = 127 * 128 + 127;
constexpr float LEAST_WEIGHT = 1e-30f;  // under it a block adds nothing
// Query heads that meet a tile of keys, or of values, at once: as registers allow.
constexpr int KEY_QUERIES = REGISTERS == 32 ? 4 : 2;
constexpr int VALUE_QUERIES = REGISTERS == 32 ? 3 : 1;

// W numbers of at most MOST_DIGITS, to the nearest whole number, as 128 high + low.
static inline void split(vec x, int8_t *high, int8_t *low) {
  const vec top = vround(vmul(x, vset(1.0f / 128)));
  vstore(high, top);
  vstore(low, vsub(x, vmul(top, vset(128))));
}

// The same of numbers from nought to MOST_WEIGHT, as digits that are not below nought.
static inline void split_weights(vec x, int8_t *high, int8_t *low) {
  const vec whole = vround(x), top = vround(vmul(vsub(whole, vset(63.5f)), vset(1.0f / 128)));
  vstore(high, top);
  vstore(low, vsub(whole, vmul(top, vset(128))));
}

static inline int32_t sum_of(const int8_t *numbers, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i += GROUP) sum += isum_group(numbers + i);
  return sum;
}

// Queries of one KV head: each is scale times (128 high + low).
struct Asked {
  alignas(64) int8_t digits[MOST_GROUP][2][MOST_HEAD_DIM];
  float scale[MOST_GROUP];
  int32_t sums[MOST_GROUP][2];              // of each digit
  float totals[MOST_GROUP][MOST_KV_GROUPS];  // of the numbers that meet a group of 4-bit keys

  template <class A> void take(const A *q, int64_t group, int64_t d) {
    for (int64_t g = 0; g < group; g++) round(q + g * d, g, d);
  }

  template <class A> void round(const A *q, int64_t g, int64_t d) {
    vec most = vzero();
    for (int64_t i = 0; i < d; i += W) most = vmax(most, vabs(vload(q + i)));
    const float top = vpeak(most), inverse = top > LEAST_WEIGHT ? MOST_DIGITS / top : 0;
    int8_t *high = digits[g][0], *low = digits[g][1];
    for (int64_t i = 0; i < d; i += W) split(vmul(vload(q + i), vset(inverse)), high + i, low + i);
    for (int64_t i = d; i < padded(d, KV_GROUP); i++) high[i] = low[i] = 0;
    scale[g] = top / MOST_DIGITS;
    sums[g][0] = sums[g][1] = 0;
    for (int64_t i = 0; i < d; i += KV_GROUP) {
      const int32_t a = sum_of(high + i, KV_GROUP), b = sum_of(low + i, KV_GROUP);
      sums[g][0] += a, sums[g][1] += b;
      totals[g][i / KV_GROUP] = (float)(128 * a + b);
    }
  }
};

// Scales of a block's tokens, and what 4 bits begin at, [groups][DECODE_BLOCK]: nought past the last.
struct Scales {
  alignas(64) float scale[MOST_KV_GROUPS][DECODE_BLOCK], low[MOST_KV_GROUPS][DECODE_BLOCK];

  void take(const bf16 *from, int64_t n, int64_t, int8_t) {
    for (int64_t j = 0; j < n; j++) scale[0][j] = widen(from[j]);
    for (int64_t j = n; j < DECODE_BLOCK; j++) scale[0][j] = 0;
  }

  void take(const bf16 *from, int64_t n, int64_t groups, Nibbles) {
    for (int64_t g = 0; g < groups; g++) {
      float *pairs = low[g];
      for (int64_t j = 0; j < n; j++) memcpy(pairs + j, from + 2 * (j * groups + g), 4);
      for (int64_t j = n; j < DECODE_BLOCK; j++) pairs[j] = 0;
      for (int64_t j = 0; j < DECODE_BLOCK; j += W) {
        const vec both = vload(pairs + j);
        vstore(scale[g] + j, vfirst_halves(both));
        vstore(pairs + j, vsecond_halves(both));
      }
    }
  }
};

// Up to TILE_COLUMNS tokens [rows][d] as columns, four numbers of each side by side: [d / 4] rows of
// TILE_COLUMNS lanes. As many bytes at `next`, and of the tokens a block further, are asked for
// meanwhile.
template <class Code>
static inline void pack_codes(const Code *from, int64_t rows, int64_t d, const Code *next, int8_t *to) {
  const int64_t row = d / PER_BYTE<Code>;
  for (int64_t half = 0; half < TILE_COLUMNS; half += W)
    for (int64_t i = 0; i < d; i += 4 * W) {
      vec x[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) {
        const int64_t at = (half + r) * row + i / PER_BYTE<Code>;
        if (half + r < rows) {
          __builtin_prefetch(next + at);
          __builtin_prefetch(from + at + DECODE_BLOCK * row);
          x[r] = vbits(ioperand(icodes(from + at, d - i), Code()));
        } else {
          x[r] = vzero();
        }
      }
      vtranspose(x);
#pragma GCC unroll 16
      for (int l = 0; l < W; l++)
        if (i + 4 * l < d) vstore((float *)to + (i / 4 + l) * TILE_COLUMNS + half, x[l]);
    }
}

// Scores of G queries from `row` on with the TILE_COLUMNS keys of `pack`, which are those from `first`
// on of a block: to rows DECODE_BLOCK apart.
template <int G, class Code>
static inline void score_codes(const Asked &asked, int64_t row, int64_t d, const int8_t *pack,
                               const Scales &of, int64_t first, float *scores) {
  const int64_t size = GROUPED<Code> ? KV_GROUP : d;
  vec sum[G][2];
  for (int g = 0; g < G; g++) sum[g][0] = sum[g][1] = vzero();
  for (int64_t i = 0; i < d; i += size) {
    ivec acc[G * 4];  // of each query two digits, of each digit two halves: flat, to stay in registers
#pragma GCC unroll 16
    for (int a = 0; a < G * 4; a++) acc[a] = ibegin(asked.sums[row + a / 4][a / 2 % 2], Code());
    for (int64_t j = i; j < smaller(d, i + size); j += 4) {
      const ivec halves[2] = {iraw(pack), iraw(pack + 4 * W)};
      pack += 4 * TILE_COLUMNS;
#pragma GCC unroll 16
      for (int a = 0; a < G * 4; a++)
        stay(acc[a] = istep(acc[a], asked.digits[row + a / 4][a / 2 % 2] + j, halves[a % 2], Code()));
    }
    const int64_t group = i / size;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const vec scale = vload(of.scale[group] + first + half * W);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const vec whole = vfloat(ijoin(acc[g * 4 + half], acc[g * 4 + 2 + half]));
        sum[g][half] = vfma(whole, scale, sum[g][half]);
        if constexpr (GROUPED<Code>)
          sum[g][half] = vfma(vload(of.low[group] + first + half * W),
                              vset(asked.totals[row + g][group]), sum[g][half]);
      }
    }
  }
  for (int g = 0; g < G; g++)
    for (int half = 0; half < 2; half++)
      vstore(scores + g * DECODE_BLOCK + half * W, vmul(sum[g][half], vset(asked.scale[row + g])));
}

// Weights of a block's tokens for G queries, each times the scale of its value: unit times
// (128 high + low), of each group.
template <int G> struct Weights {
  alignas(64) int8_t digits[G][MOST_KV_GROUPS][2][DECODE_BLOCK];
  float unit[G][MOST_KV_GROUPS], offset[G][MOST_KV_GROUPS];

  template <class Code>
  void take(const float *weights, int64_t n, const Scales &of, int64_t groups, Code) {
    for (int g = 0; g < G; g++, weights += DECODE_BLOCK)
      for (int64_t group = 0; group < groups; group++) {
        vec most = vzero(), shift = vzero(), x[DECODE_BLOCK / W];
        for (int64_t j = 0; j < DECODE_BLOCK; j += W) {
          const vec weight = j < n ? vload(weights + j) : vzero();
          x[j / W] = vmul(weight, vload(of.scale[group] + j));
          most = vmax(most, x[j / W]);
          if (GROUPED<Code>) shift = vfma(weight, vload(of.low[group] + j), shift);
        }
        const float top = vpeak(most), inverse = top > LEAST_WEIGHT ? MOST_WEIGHT / top : 0;
        int8_t *high = digits[g][group][0], *low = digits[g][group][1];
        for (int64_t j = 0; j < DECODE_BLOCK; j += W)
          split_weights(vmul(x[j / W], vset(inverse)), high + j, low + j);
        unit[g][group] = top / MOST_WEIGHT;
        offset[g][group] = GROUPED<Code> ? vsum(shift) : 0;
      }
  }
};

// out[g] [d] += weights[g] . values for the columns from i on of a block's n tokens.
template <int G, class Code>
static inline void weigh_columns(const Code *values, int64_t n, int64_t d, int64_t i,
                                 const Weights<G> &by, float *out) {
  const int64_t row = d / PER_BYTE<Code>, first = GROUPED<Code> ? i / KV_GROUP : 0;
  const int64_t second = i + KV_GROUP < d ? first + 1 : first;
  ivec acc[G * 8];  // of each query two digits, of each digit four vectors
#pragma GCC unroll 24
  for (int a = 0; a < G * 8; a++) acc[a] = izero();
  for (int64_t j = 0; j < n; j += 4) {
    ivec x[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {  // past the last token weights are nought
      const Code *from = values + smaller(j + r, n - 1) * row + i / PER_BYTE<Code>;
      x[r] = icodes(from, d - i);
    }
    izip(x);
#pragma GCC unroll 24
    for (int a = 0; a < G * 8; a++) {
      const int8_t *four = by.digits[a / 8][first][a / 4 % 2] + j;
      const int8_t *more = by.digits[a / 8][second][a / 4 % 2] + j;
      stay(acc[a] = iweigh<GROUPED<Code>>(acc[a], four, more, x[a % 4]));
    }
  }
#pragma GCC unroll 3
  for (int g = 0; g < G; g++) {
    vec sum[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) sum[part] = vfloat(ijoin(acc[g * 8 + part], acc[g * 8 + 4 + part]));
    vinorder(sum);
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
      const int64_t column = i + part * W, group = GROUPED<Code> ? column / KV_GROUP : 0;
      float *to = out + g * d + column;
      if (column < d)
        vstore(to, vfma(sum[part], vset(by.unit[g][group]), vadd(vload(to), vset(by.offset[g][group]))));
    }
  }
}

template <int G, class Code>
static inline void weigh_codes(const Code *values, int64_t n, int64_t d, const float *weights,
                               const Scales &of, int64_t groups, float *out) {
  Weights<G> by;
  by.take(weights, n, of, groups, Code());
  for (int64_t i = 0; i < d; i += 4 * W) weigh_columns<G>(values, n, d, i, by, out);
}

// Add n tokens, all seen, to the running softmax of `group` queries, scaled for 2^x. `cap`: of the
// scores, 0 for none.
template <class Code>
static void attend_codes(const Asked &asked, int64_t group, int64_t d, Tokens keys, Tokens values,
                         int64_t n, Partial to, float cap) {
  alignas(64) float scores[MOST_GROUP * DECODE_BLOCK], weights[MOST_GROUP * DECODE_BLOCK];
  alignas(64) int8_t pack[TILE_COLUMNS * MOST_HEAD_DIM];
  Scales of;
  const int64_t groups = GROUPED<Code> ? (d + KV_GROUP - 1) / KV_GROUP : 1;
  for (int64_t j = 0; j < n; j += DECODE_BLOCK) {
    const int64_t block = smaller(DECODE_BLOCK, n - j);
    const Tokens k = keys.skip(j), v = values.skip(j);
    of.take((const bf16 *)k.scales, block, groups, Code());
    for (int64_t c = 0; c < block; c += TILE_COLUMNS) {
      pack_codes((const Code *)k.skip(c).numbers, block - c, d, (const Code *)v.skip(c).numbers, pack);
      by_queries<KEY_QUERIES>(group, [&](auto count, int64_t g) {
        score_codes<count(), Code>(asked, g, d, pack, of, c, scores + g * DECODE_BLOCK + c);
      });
    }
    for (int64_t g = 0; cap && g < group; g++) cap_scores(scores + g * DECODE_BLOCK, block, cap);
    for (int64_t g = 0; g < group; g++) soften(scores, DECODE_BLOCK, block, g, to, d, weights);
    of.take((const bf16 *)v.scales, block, groups, Code());
    by_queries<VALUE_QUERIES>(group, [&](auto count, int64_t g) {
      weigh_codes<count()>((const Code *)v.numbers, block, d, weights + g * DECODE_BLOCK, of, groups,
                           to.out + g * d);
    });
  }
}
