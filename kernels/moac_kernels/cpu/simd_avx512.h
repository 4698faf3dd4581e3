// AVX-512 with VNNI, without bfloat16 instructions: every multiplicand is widened to float32.
#pragma once
#include "simd_wide.h"

static inline void vstore(bf16 *p, vec x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
static inline vec vweights(const bf16 *p, float) { return vload(p); }
static inline vec vweights(const bf16 *p, int64_t lanes, float) {
  const __m256i x = _mm256_maskz_loadu_epi16((__mmask16)((1u << lanes) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
