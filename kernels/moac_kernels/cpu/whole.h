// Products in whole numbers: activations rounded to 8 bits, a scale for each BLOCK of a token, and
// weights of 8 bits. Sums of a block are exact; blocks are added in float32.
#pragma once
#include <string.h>

#include "matmul.h"

constexpr int64_t GROUP = 32;  // numbers that share a sum; of 4-bit weights also a scale
constexpr int64_t AHEAD = 8192;  // bytes from what is read to what is asked for meanwhile
constexpr float MOST_WHOLE = 127;

// Activations of m tokens, k wide, as whole numbers of -127 to 127. Zeros stand past the end of the
// last block.
struct Rounded {
  int64_t k = 0;
  int8_t *numbers = nullptr;  // [m][padded k]
  float *scales = nullptr;    // [m][groups]: those of a block are equal
  float *offsets = nullptr;   // [m][groups]: scale times the sum of the group's numbers
  int32_t *sums = nullptr;    // [m][blocks]

  int64_t width() const { return padded(k, BLOCK); }
  int64_t blocks() const { return width() / BLOCK; }
  int64_t groups() const { return width() / GROUP; }

  static int64_t bytes(int64_t m, int64_t k) {
    return m * padded(k, BLOCK) / BLOCK * (BLOCK + 2 * 2 * sizeof(float) + sizeof(int32_t));
  }

  // Lie in bytes(m, k) of memory.
  void lie_at(void *memory, int64_t m, int64_t k_) {
    k = k_;
    numbers = (int8_t *)memory;
    scales = (float *)(numbers + m * width());
    offsets = scales + m * groups();
    sums = (int32_t *)(offsets + m * groups());
  }

  // The rows from r on.
  Rounded from(int64_t r) const {
    return {k, numbers + r * width(), scales + r * groups(), offsets + r * groups(),
            sums + r * blocks()};
  }

  // Round row r, [k] of activations; k is a multiple of 16.
  template <class A> void round(int64_t r, const A *from) const {
    for (int64_t b = 0; b < blocks(); b++)
      round_block(from + b * BLOCK, smaller(BLOCK, k - b * BLOCK), r * blocks() + b);
  }

  template <class A> void round_block(const A *from, int64_t count, int64_t block) const {
    int8_t *to = numbers + block * BLOCK;
    vec most = vzero();
    for (int64_t i = 0; i < count; i += W) most = vmax(most, vabs(vload(from + i)));
    const float scale = vpeak(most) / MOST_WHOLE, inverse = scale > 0 ? 1 / scale : 0;
    for (int64_t i = 0; i < count; i += W) vstore(to + i, vmul(vload(from + i), vset(inverse)));
    if (count < BLOCK) memset(to + count, 0, BLOCK - count);
    sums[block] = 0;
    for (int64_t g = 0; g < BLOCK / GROUP; g++) {
      const int32_t sum = isum_group(to + g * GROUP);
      sums[block] += sum;
      scales[block * (BLOCK / GROUP) + g] = scale;
      offsets[block * (BLOCK / GROUP) + g] = scale * sum;
    }
  }
};

// c[r][q] = a[r] . w[q] for R tokens from `row` on and Q rows of weights.
template <int R, int Q>
static inline void whole_dots(const Rounded &a, int64_t row, const int8_t *w, int64_t ldw, float *c,
                              int64_t ldc) {
  vec acc[R][Q];
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) acc[r][q] = vzero();
  const int64_t blocks = a.blocks(), whole = a.k / BLOCK;
  const int8_t *numbers = a.numbers + row * a.width();
  const float *scales = a.scales + row * a.groups();
  const int32_t *sums = a.sums + row * blocks;
  auto add = [&](int64_t b, const int8_t *from, int64_t stride) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const ivec sum = idot_block(numbers + (r * blocks + b) * BLOCK, from + q * stride,
                                    sums[r * blocks + b]);
        acc[r][q] = vfma(vfloat(sum), vset(scales[(r * blocks + b) * (BLOCK / GROUP)]), acc[r][q]);
      }
  };
  for (int64_t b = 0; b < whole; b++) {
    for (int q = 0; q < Q; q++) __builtin_prefetch(w + q * ldw + b * BLOCK + AHEAD);
    add(b, w + b * BLOCK, ldw);
  }
  if (whole < blocks) {  // nothing past the weights is read
    alignas(64) int8_t rest[Q * BLOCK] = {0};
    for (int q = 0; q < Q; q++)
      memcpy(rest + q * BLOCK, w + q * ldw + whole * BLOCK, a.k - whole * BLOCK);
    add(whole, rest, BLOCK);
  }
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) c[r * ldc + q] = vsum(acc[r][q]);
}

// c [m][columns] where tokens are few: weights are read once, four rows at a time.
static void whole_few(const Rounded &a, int64_t m, const int8_t *w, int64_t columns, float *c,
                      int64_t ldc) {
  const int64_t k = a.k;
  for (int64_t n = 0; n < columns; n += 4) {
    const int64_t block = smaller(4, columns - n);
    const int8_t *rows = w + n * k;
    int64_t r = 0;
    for (; r + 4 <= m; r += 4)
      for (int64_t q = 0; q < block; q += 2) {
        float *to = c + r * ldc + n + q;
        if (block - q >= 2) whole_dots<4, 2>(a, r, rows + q * k, k, to, ldc);
        else whole_dots<4, 1>(a, r, rows + q * k, k, to, ldc);
      }
    for (; r < m; r++) {
      float *to = c + r * ldc + n;
      if (block == 4) whole_dots<1, 4>(a, r, rows, k, to, ldc);
      else for (int64_t q = 0; q < block; q++) whole_dots<1, 1>(a, r, rows + q * k, k, to + q, ldc);
    }
  }
}

// Keep an accumulator in the register it is in: compilers else move all of them in every round.
template <class V> static inline void stay(V &accumulator) {
#if defined(__aarch64__)
  __asm__("" : "+w"(accumulator));
#else
  __asm__("" : "+v"(accumulator));
#endif
}

// c [TILE_ROWS][TILE_COLUMNS] (+)= a . b for the `part` of k from `first` on; b packed.
static inline void whole_tile(const Rounded &a, int64_t row, int64_t first, int64_t part,
                              const int8_t *b, float *c, int64_t ldc) {
  const int64_t blocks = a.blocks();
  for (int64_t i = 0; i < part; i += BLOCK) {
    const int64_t block = row * blocks + (first + i) / BLOCK;
    const int8_t *numbers = a.numbers + block * BLOCK;
    ivec acc[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++) acc[r][0] = acc[r][1] = ibegin(a.sums[block + r * blocks]);
    const int64_t stop = smaller(BLOCK, part - i);
    for (int64_t j = 0; j < stop; j += 4) {
      const ivec b0 = iraw(b), b1 = iraw(b + 4 * W);
      b += 4 * TILE_COLUMNS;
#pragma GCC unroll 12
      for (int r = 0; r < TILE_ROWS; r++) {
        const int8_t *four = numbers + r * blocks * BLOCK + j;
        stay(acc[r][0] = istep(acc[r][0], four, b0));
        stay(acc[r][1] = istep(acc[r][1], four, b1));
      }
    }
    const bool add = first + i > 0;
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++) {
      const vec scale = vset(a.scales[(block + r * blocks) * (BLOCK / GROUP)]);
      float *to = c + r * ldc;
      vstore(to, vfma(vfloat(acc[r][0]), scale, add ? vload(to) : vzero()));
      vstore(to + W, vfma(vfloat(acc[r][1]), scale, add ? vload(to + W) : vzero()));
    }
  }
}

// c [padded m][columns] by packed tiles, as `many` of matmul.h.
static void whole_many(const Rounded &a, int64_t m, const int8_t *w, int64_t columns, float *c,
                       int64_t ldc, int8_t *pack) {
  constexpr int64_t depth = PANEL_LANES * LANE<int8_t>;
  for (int64_t n = 0; n < columns; n += TILE_COLUMNS)
    for (int64_t i = 0; i < a.k; i += depth) {
      const int64_t part = smaller(depth, a.k - i);
      pack_columns(w + n * a.k + i, a.k, columns - n, part, pack);
      for (int64_t r = 0; r < m; r += TILE_ROWS)
        whole_tile(a, r, i, part, pack, c + r * ldc + n, ldc);
    }
}
