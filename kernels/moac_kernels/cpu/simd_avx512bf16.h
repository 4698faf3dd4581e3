// AVX-512 with bfloat16 dot products and VNNI: bfloat16 stays, two to a 32-bit lane.
#pragma once
#include "simd_wide.h"

template <> struct Operand<bf16> { typedef bf16 type; };

static inline void vstore(bf16 *p, vec x) {
  _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
}
static inline vec vlane(const bf16 *p) {
  float pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm512_set1_ps(pair);
}
static inline vec vdot(vec acc, vec a, vec b, bf16) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
static inline vec vraw(const bf16 *p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
static inline vec vraw_half(const bf16 *p) {
  return _mm512_castsi512_ps(_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)p)));
}

// 8-bit numbers, which bfloat16 holds exactly, two to a lane.
static inline vec vpairs(__m256i x) {
  vec low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)));
  vec high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1)));
  return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
}
static inline vec vraw_half(const int8_t *p) {
  return vpairs(_mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)p)));
}
static inline vec vweights(const bf16 *p, bf16) { return vraw(p); }
static inline vec vweights(const int8_t *p, bf16) {
  return vpairs(_mm256_loadu_si256((const __m256i *)p));
}
static inline vec vweights(const bf16 *p, int64_t lanes, bf16) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << lanes) - 1), p);
}
static inline vec vweights(const int8_t *p, int64_t lanes, bf16) {
  return vpairs(_mm256_maskz_loadu_epi8((__mmask32)((1ull << 2 * lanes) - 1), p));
}

// Two rows of up to 2 W numbers, b null for zeros, as pairs in lanes: `low` and `high` together
// hold all columns, which vunzip puts in order.
static inline void vzip(const bf16 *a, const bf16 *b, int64_t columns, vec &low, vec &high) {
  const __mmask32 inside = columns >= 32 ? 0xffffffffu : 0xffffu;
  const __m512i x = _mm512_maskz_loadu_epi16(inside, a);
  const __m512i y = b ? _mm512_maskz_loadu_epi16(inside, b) : _mm512_setzero_si512();
  low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y));
  high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y));
}
static inline void vunzip(vec &low, vec &high, bf16) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i last =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const vec ordered = _mm512_permutex2var_ps(low, first, high);
  high = _mm512_permutex2var_ps(low, last, high);
  low = ordered;
}
