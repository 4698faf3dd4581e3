// The whole-number kernels of an instruction set against plain sums: the same numbers, also where
// every product is as large as it gets. Exits 0 where they are, 1 with what was not.
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

#include "packed.h"

static uint64_t state = 88172645463325252u;
static uint64_t roll(uint64_t sides) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (state >> 11) % sides;
}

// Numbers of -127 to 127: any, the largest of one sign, or the largest of both.
static int8_t some(int kind) {
  const int8_t any = (int8_t)(roll(255) - 127);
  return kind == 0 ? any : kind == 1 ? 127 : kind == 2 ? -127 : roll(2) ? 127 : -127;
}

static void check(const char *what, double found, double wanted) {
  if (found == wanted) return;
  printf("%s: %f in place of %f\n", what, found, wanted);
  exit(1);
}

static float sum_of(ivec lanes) { return vsum(vfloat(lanes)); }

static void check_blocks(int a_kind, int w_kind) {
  alignas(64) int8_t a[BLOCK], w[BLOCK];
  alignas(64) uint8_t halves[BLOCK / 2];
  double wanted = 0, sum = 0, first = 0, second = 0;
  for (int64_t i = 0; i < BLOCK; i++) {
    a[i] = some(a_kind), w[i] = some(w_kind);
    wanted += a[i] * w[i], sum += a[i];
  }
  check("a block", sum_of(idot_block(a, w, (int32_t)sum)), wanted);
  check("the sum of a block", isum_group(a) + isum_group(a + GROUP), sum);
  for (int64_t i = 0; i < BLOCK / 2; i++) {
    halves[i] = w_kind ? 0xff : (uint8_t)roll(256);
    first += a[i] * (halves[i] & 15), second += a[GROUP + i] * (halves[i] >> 4);
  }
  const float scales[2] = {2, 0.5f};
  check("a packed block", vsum(ipacked_block(vzero(), a, halves, scales)), 2 * first + second / 2);
}

// Products of m tokens, k wide, with as many rows of weights as there are columns. All scales are
// powers of two, so that sums are exact in float32 too.
static void check_products(int64_t m, int64_t k, int64_t columns, int kind) {
  const int64_t rows = padded(m, TILE_ROWS);
  float *activations = (float *)calloc(rows * k, sizeof(float));
  int8_t *w = (int8_t *)malloc(columns * k);
  float *c = (float *)calloc(rows * padded(columns, TILE_COLUMNS), sizeof(float));
  void *memory = aligned_alloc(64, padded(Rounded::bytes(rows, k), 64));
  int8_t *pack = (int8_t *)aligned_alloc(64, PANEL_LANES * TILE_COLUMNS * 4);
  for (int64_t i = 0; i < m * k; i++) activations[i] = some(kind);
  for (int64_t i = 0; i < m * k; i += 16) activations[i] = 127;  // every block's scale is one
  for (int64_t i = 0; i < columns * k; i++) w[i] = some(kind);
  Rounded a;
  memset(memory, 0, Rounded::bytes(rows, k));
  a.lie_at(memory, rows, k);
  for (int64_t r = 0; r < m; r++) a.round(r, activations + r * k);
  const int64_t ldc = padded(columns, TILE_COLUMNS);
  for (int many = 0; many < 2; many++) {
    if (many) whole_many(a, m, w, columns, c, ldc, pack);
    else whole_few(a, m, w, columns, c, ldc);
    for (int64_t r = 0; r < m; r++)
      for (int64_t n = 0; n < columns; n++) {
        double wanted = 0;
        for (int64_t i = 0; i < k; i++) wanted += (double)activations[r * k + i] * w[n * k + i];
        if (wanted < 16777216 && wanted > -16777216)  // exact in float32
          check(many ? "a product of many" : "a product of few", c[r * ldc + n], wanted);
      }
  }
  free(activations), free(w), free(c), free(memory), free(pack);
}

int main() {
  for (int repeat = 0; repeat < 200; repeat++)
    for (int a = 0; a < 4; a++)
      for (int w = 0; w < 4; w++) check_blocks(a, w);
  for (int64_t k : {16, 48, 64, 80, 112, 128, 576})
    for (int64_t m : {1, 3, 4, 7, 13})
      for (int64_t columns : {1, 3, 4, 7, 16, 33}) check_products(m, k, columns, (int)roll(4));
  puts("exact");
  return 0;
}
