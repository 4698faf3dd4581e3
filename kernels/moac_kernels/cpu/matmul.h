// Products of activations [M, K] with weights [N, K], both row-major: dot products along memory
// where rows are few and reading the weights is all the time, packed tiles where they are many.
#pragma once
#include "simd.h"

constexpr int64_t FEW_ROWS = 16;  // most of a segment that goes by dot products

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// room for m rows of which any run may go by whole tiles
static inline int64_t spare(int64_t m) { return padded(m, TILE_ROWS) + TILE_ROWS; }

// c[m][n] = a[m] . w[n] for R rows of a and Q rows of w; k is a multiple of 16. Memory is streamed
// once: what lies `ahead` elements further is asked for on the way.
template <int R, int Q, class A, class T>
static inline void dots(const A *a, int64_t lda, const T *w, int64_t ldw, int64_t k, float *c,
                        int64_t ldc, int64_t ahead) {
  vec acc[R][Q];
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) acc[r][q] = vzero();
  constexpr int64_t step = W * LANE<A>;
  int64_t i = 0;
  for (; i + step <= k; i += step) {
    vec x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) x[r] = vraw(a + r * lda + i);
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) {
      const T *from = w + q * ldw + i;
      __builtin_prefetch(from + ahead);
      vec y = vweights(from, A());
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][q] = vdot(acc[r][q], x[r], y, A());
    }
  }
  if constexpr (step > 16) {  // half a vector may be left
    if (i < k)
      for (int q = 0; q < Q; q++)
        for (int r = 0; r < R; r++)
          acc[r][q] = vdot(acc[r][q], vraw_half(a + r * lda + i), vraw_half(w + q * ldw + i), A());
  }
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) c[r * ldc + q] = vsum(acc[r][q]);
}

// Q rows of weights at a time; those of the next four are asked for meanwhile.
template <int R, int Q, class A, class T>
static void dot_rows(const A *a, int64_t lda, const T *w, int64_t ldw, int64_t k, float *c,
                     int64_t ldc, int64_t columns) {
  int64_t n = 0;
  for (; n + Q <= columns; n += Q) dots<R, Q>(a, lda, w + n * ldw, ldw, k, c + n, ldc, 4 * ldw);
  for (; n < columns; n++) dots<R, 1>(a, lda, w + n * ldw, ldw, k, c + n, ldc, ldw);
}

// c [m][columns] by dot products; a few rows of weights stay in the cache for all rows of a. 8-bit
// ones, which take work to widen, meet eight rows at a time where there are registers for it.
template <class A, class T>
static void few(const A *a, int64_t m, int64_t k, const T *w, int64_t columns, float *c,
                int64_t ldc) {
  for (int64_t n = 0; n < columns; n += 4) {
    int64_t block = smaller(4, columns - n), r = 0;
    const T *rows = w + n * k;
    if constexpr (sizeof(T) == 1 && REGISTERS == 32)
      for (; r + 8 <= m; r += 8) dot_rows<8, 2>(a + r * k, k, rows, k, k, c + r * ldc + n, ldc, block);
    for (; r + 4 <= m; r += 4) dot_rows<4, 4>(a + r * k, k, rows, k, k, c + r * ldc + n, ldc, block);
    for (; r < m; r++) dot_rows<1, 4>(a + r * k, k, rows, k, k, c + r * ldc + n, ldc, block);
  }
}

// c [TILE_ROWS][TILE_COLUMNS] (+)= a . b, b packed: `lanes` rows of TILE_COLUMNS lanes.
template <class A>
static inline void tile(int64_t lanes, const A *a, int64_t lda, const A *b, float *c, int64_t ldc,
                        bool add) {
  vec acc[TILE_ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < TILE_ROWS; r++) {
    acc[r][0] = add ? vload(c + r * ldc) : vzero();
    acc[r][1] = add ? vload(c + r * ldc + W) : vzero();
  }
  for (int64_t i = 0; i < lanes; i++) {
    vec b0 = vraw(b), b1 = vraw(b + W * LANE<A>);
    b += TILE_COLUMNS * LANE<A>;
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++) {
      vec x = vlane(a + r * lda + i * LANE<A>);
      acc[r][0] = vdot(acc[r][0], x, b0, A());
      acc[r][1] = vdot(acc[r][1], x, b1, A());
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < TILE_ROWS; r++) {
    vstore(c + r * ldc, acc[r][0]);
    vstore(c + r * ldc + W, acc[r][1]);
  }
}

// W rows of weights, `ld` elements apart, as columns: those past `rows` are zero; written as `lanes`
// rows, at most W, of TILE_COLUMNS lanes of A.
template <class A, class T>
static inline void transpose(const T *from, int64_t ld, int64_t rows, int64_t lanes, float *to) {
  vec x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if (i >= rows) x[i] = vzero();
    else if constexpr (W * LANE<A> <= 16) x[i] = vweights(from + i * ld, A());  // k is whole
    else x[i] = vweights(from + i * ld, smaller(lanes, W), A());
  }
  vtranspose(x);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (i < lanes) vstore(to + i * TILE_COLUMNS, x[i]);
}

// Rows [rows][k] become the columns of a packed operand: k / LANE rows of TILE_COLUMNS lanes.
template <class A, class T>
static void pack_columns(const T *from, int64_t ld, int64_t rows, int64_t k, A *to) {
  const int64_t lanes = k / LANE<A>;
  for (int64_t half = 0; half < TILE_COLUMNS; half += W)
    for (int64_t i = 0; i < lanes; i += W)
      transpose<A>(from + half * ld + i * LANE<A>, ld, rows - half, lanes - i,
                   (float *)to + i * TILE_COLUMNS + half);
}

constexpr int64_t PANEL_LANES = 1024;  // a packed panel of 128 KiB at most, half of a small L2

// c [padded m][columns] by packed tiles; `pack` holds PANEL_LANES rows of TILE_COLUMNS lanes. a has
// rows to spare up to a multiple of TILE_ROWS, c has columns to spare up to one of TILE_COLUMNS.
template <class A, class T>
static void many(const A *a, int64_t m, int64_t k, const T *w, int64_t columns, float *c,
                 int64_t ldc, A *pack) {
  constexpr int64_t depth = PANEL_LANES * LANE<A>;
  for (int64_t n = 0; n < columns; n += TILE_COLUMNS)
    for (int64_t i = 0; i < k; i += depth) {
      int64_t part = smaller(depth, k - i);
      pack_columns(w + n * k + i, k, columns - n, part, pack);
      for (int64_t r = 0; r < m; r += TILE_ROWS)
        tile(part / LANE<A>, a + r * k + i, k, pack, c + r * ldc + n, ldc, i > 0);
    }
}
