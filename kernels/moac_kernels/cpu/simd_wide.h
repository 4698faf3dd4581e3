// Vectors of 512 bits: what both builds with AVX-512 share.
#pragma once
#include <immintrin.h>

typedef __m512 vec;
constexpr int W = 16;
constexpr int REGISTERS = 32;
constexpr int TILE_ROWS = 12;  // 24 accumulators, 2 operands and a broadcast fill 27 of 32 registers

static inline vec vset(float x) { return _mm512_set1_ps(x); }
static inline vec vload(const float *p) { return _mm512_loadu_ps(p); }
static inline vec vload(const bf16 *p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline vec vload(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void vstore(float *p, vec x) { _mm512_storeu_ps(p, x); }
static inline vec vadd(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec vsub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec vmul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec vdiv(vec a, vec b) { return _mm512_div_ps(a, b); }
static inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline float vsum(vec x) { return _mm512_reduce_add_ps(x); }
static inline float vpeak(vec x) { return _mm512_reduce_max_ps(x); }
static inline vec vround(vec x) { return _mm512_roundscale_ps(x, 8); }
static inline vec vscale2(vec x, vec n) { return _mm512_scalef_ps(x, n); }
static inline float from_half(uint16_t x) { return _cvtsh_ss(x); }

// One packed lane from memory in every lane, and acc + a * b over the lane's elements.
static inline vec vlane(const float *p) { return _mm512_set1_ps(*p); }
static inline vec vdot(vec acc, vec a, vec b, float) { return _mm512_fmadd_ps(a, b, acc); }

// A vector of operands as it lies in memory, for dot products along memory.
static inline vec vraw(const float *p) { return _mm512_loadu_ps(p); }

// A vector of weights, however they are stored, as operands of the type of the last argument; with
// `lanes` the first of them alone, at most W: nothing past them is read.
static inline vec vweights(const float *p, float) { return vraw(p); }
static inline vec vweights(const int8_t *p, float) { return vload(p); }
static inline vec vweights(const float *p, int64_t lanes, float) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << lanes) - 1), p);
}
static inline vec vweights(const int8_t *p, int64_t lanes, float) {
  const __m128i x = _mm_maskz_loadu_epi8((__mmask16)((1u << lanes) - 1), p);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}

// The transpose of 16 by 16 lanes.
static inline void vtranspose(vec *x) {
  vec y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(y[i]), _mm512_castps_pd(y[i + 2])));
    x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(y[i]), _mm512_castps_pd(y[i + 2])));
    x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(y[i + 1]), _mm512_castps_pd(y[i + 3])));
    x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(y[i + 1]), _mm512_castps_pd(y[i + 3])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_f32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// ---- whole numbers of 8 bits: the dot product takes one unsigned side, so weights have 128 added
// to them, and 128 times the sum of the activations is where the sum begins.

typedef __m512i ivec;

static inline vec vfloat(ivec x) { return _mm512_cvtepi32_ps(x); }
static inline ivec ioffset(ivec x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
static inline ivec iweights(const int8_t *p) { return ioffset(_mm512_loadu_si512(p)); }
// lanes that sum to a . w of a BLOCK; `sum`: of its activations
static inline ivec idot_block(const int8_t *a, const int8_t *w, int32_t sum) {
  const ivec start = _mm512_maskz_set1_epi32(1, -128 * sum);
  return _mm512_dpbusd_epi32(start, iweights(w), _mm512_loadu_si512(a));
}
// the same in every lane of W columns at once, of four numbers at a time: where it begins, a step
static inline ivec ibegin(int32_t sum) { return _mm512_set1_epi32(-128 * sum); }
static inline ivec istep(ivec acc, const int8_t *a, ivec w) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
}
static inline ivec iraw(const int8_t *p) { return _mm512_loadu_si512(p); }
static inline vec vweights(const int8_t *p, int8_t) { return _mm512_castsi512_ps(iweights(p)); }
static inline vec vweights(const int8_t *p, int64_t lanes, int8_t) {
  const __mmask16 inside = (__mmask16)((1u << lanes) - 1);
  return _mm512_castsi512_ps(ioffset(_mm512_maskz_loadu_epi32(inside, p)));
}
// W numbers, rounded to nearest
static inline void vstore(int8_t *p, vec x) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
static inline vec vabs(vec x) { return _mm512_abs_ps(x); }
static inline int32_t isum_group(const int8_t *a) {  // of 32 numbers
  const __m256i numbers = _mm256_loadu_si256((const __m256i *)a);
  const ivec sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1),
                                        _mm512_zextsi256_si512(numbers));
  return _mm512_reduce_add_epi32(sums);
}

// ---- numbers of 4 bits, two a byte: acc plus a . w of a BLOCK, each of its two groups by its scale
static inline vec ipacked_block(vec acc, const int8_t *a, const uint8_t *w, const float *scales) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i *)w), half = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(bytes, half);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), half);
  const ivec numbers = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  const ivec sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), numbers, _mm512_loadu_si512(a));
  const vec second = _mm512_set1_ps(scales[1]);
  return vfma(vfloat(sums), _mm512_mask_mov_ps(second, 0xff, _mm512_set1_ps(scales[0])), acc);
}
// of two bfloat16 in each lane, as they lie in memory, the first or the second
static inline vec vfirst_halves(vec x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16));
}
static inline vec vsecond_halves(vec x) {
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), high));
}

// ---- keys and values of 8 bits, or of 4, two a byte: up to 4 W numbers side by side, `count` of
// them, a multiple of 16, and zeros after them: nothing past them is read
static inline ivec icodes(const int8_t *p, int64_t count) {
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~0ull : (1ull << count) - 1, p);
}
static inline ivec icodes(const Nibbles *p, int64_t count) {
  const __mmask32 inside = count >= 64 ? ~0u : (1u << count / 2) - 1;
  const ivec wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(inside, p));
  return _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
}
static inline ivec izero() { return _mm512_setzero_si512(); }
// as the side of a product that istep takes; those of 4 bits have no sign to be moved away
static inline ivec ioperand(ivec x, int8_t) { return ioffset(x); }
static inline ivec ioperand(ivec x, Nibbles) { return x; }
static inline ivec ibegin(int32_t sum, int8_t) { return ibegin(sum); }
static inline ivec ibegin(int32_t, Nibbles) { return izero(); }
static inline ivec istep(ivec acc, const int8_t *a, ivec w, int8_t) { return istep(acc, a, w); }
static inline ivec istep(ivec acc, const int8_t *a, ivec w, Nibbles) { return istep(acc, a, w); }
// the same of signed numbers w with four at `a` that are not below nought; `halves`: those are for the
// first half of a row's columns, and those at `b` for the rest
template <bool halves>
static inline ivec iweigh(ivec acc, const int8_t *a, const int8_t *b, ivec w) {
  int32_t first, rest;
  __builtin_memcpy(&first, a, 4);
  __builtin_memcpy(&rest, b, 4);
  const ivec whole = _mm512_set1_epi32(first);
  return _mm512_dpbusd_epi32(acc, halves ? _mm512_mask_set1_epi32(whole, 0xff00, rest) : whole, w);
}
static inline ivec ijoin(ivec high, ivec low) {  // 128 high + low
  return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
}
static inline vec vbits(ivec x) { return _mm512_castsi512_ps(x); }
// Four rows to their columns, four numbers a lane; vinorder puts what was added up in such lanes in
// the order of the columns.
static inline void izip(ivec *x) {
  const ivec a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
  const ivec c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi16(a, c);
  x[1] = _mm512_unpackhi_epi16(a, c);
  x[2] = _mm512_unpacklo_epi16(b, d);
  x[3] = _mm512_unpackhi_epi16(b, d);
}
static inline void vinorder(vec *x) {
  const vec a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
  const vec c = _mm512_shuffle_f32x4(x[2], x[3], 0x44), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  x[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
  x[2] = _mm512_shuffle_f32x4(b, d, 0x88);
  x[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

// Each lane's partner: the one whose number differs in the bit `stride`.
template <int stride> static inline vec vswap(vec x) {
  if constexpr (stride == 1) return _mm512_permute_ps(x, 0xb1);
  else if constexpr (stride == 2) return _mm512_permute_ps(x, 0x4e);
  else return _mm512_shuffle_f32x4(x, x, stride == 4 ? 0xb1 : 0x4e);
}
