// One vector type of W floats for both builds, and what the kernels do with it.
#pragma once
#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

static inline float widen(float x) { return x; }
static inline float widen(int8_t x) { return x; }
static inline float widen(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

#if defined(__AVX512BF16__)

typedef __m512 vec;
constexpr int W = 16;
constexpr int TILE_ROWS = 12;  // 24 accumulators, 2 operands and a broadcast fill 27 of 32 registers

// Multiplicands: bfloat16 stays, two to a 32-bit lane of the dot product instruction.
template <class T> struct Operand;
template <> struct Operand<bf16> { typedef bf16 type; };
template <> struct Operand<float> { typedef float type; };
template <class A> constexpr int LANE = 4 / sizeof(A);

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
static inline void vstore(bf16 *p, vec x) {
  _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
}
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

// One packed lane from memory in every lane, and acc + a * b over the lane's elements.
static inline vec vlane(const float *p) { return _mm512_set1_ps(*p); }
static inline vec vlane(const bf16 *p) {
  float pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm512_set1_ps(pair);
}
static inline vec vdot(vec acc, vec a, vec b, float) { return _mm512_fmadd_ps(a, b, acc); }
static inline vec vdot(vec acc, vec a, vec b, bf16) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

// A vector of operands as it lies in memory, for dot products along memory.
static inline vec vraw(const float *p) { return _mm512_loadu_ps(p); }
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

// A vector of weights, however they are stored, as operands of the type of the last argument.
static inline vec vweights(const float *p, float) { return vraw(p); }
static inline vec vweights(const bf16 *p, bf16) { return vraw(p); }
static inline vec vweights(const int8_t *p, float) { return vload(p); }
static inline vec vweights(const int8_t *p, bf16) {
  return vpairs(_mm256_loadu_si256((const __m256i *)p));
}

// The same of the first lanes alone, at most W; nothing past them is read.
static inline vec vweights(const float *p, int64_t lanes, float) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << lanes) - 1), p);
}
static inline vec vweights(const bf16 *p, int64_t lanes, bf16) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << lanes) - 1), p);
}
static inline vec vweights(const int8_t *p, int64_t lanes, float) {
  const __m128i x = _mm_maskz_loadu_epi8((__mmask16)((1u << lanes) - 1), p);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}
static inline vec vweights(const int8_t *p, int64_t lanes, bf16) {
  return vpairs(_mm256_maskz_loadu_epi8((__mmask32)((1ull << 2 * lanes) - 1), p));
}

#else

typedef __m256 vec;
constexpr int W = 8;
constexpr int TILE_ROWS = 6;  // 12 accumulators, 2 operands and a broadcast fill 15 of 16 registers

// Without a bfloat16 instruction every multiplicand is widened to float32.
template <class T> struct Operand { typedef float type; };
template <class A> constexpr int LANE = 1;

static inline vec vset(float x) { return _mm256_set1_ps(x); }
static inline vec vload(const float *p) { return _mm256_loadu_ps(p); }
static inline vec vload(const bf16 *p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline vec vload(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline void vstore(float *p, vec x) { _mm256_storeu_ps(p, x); }
static inline void vstore(bf16 *p, vec x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  bits = _mm256_srli_epi32(bits, 16);
  bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 8);
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(bits));
}
static inline vec vadd(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec vsub(vec a, vec b) { return _mm256_sub_ps(a, b); }
static inline vec vmul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec vdiv(vec a, vec b) { return _mm256_div_ps(a, b); }
static inline vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline float vsum(vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline float vpeak(vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
static inline vec vround(vec x) { return _mm256_round_ps(x, 8); }
static inline vec vscale2(vec x, vec n) {
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return vmul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

static inline vec vlane(const float *p) { return _mm256_set1_ps(*p); }
static inline vec vdot(vec acc, vec a, vec b, float) { return _mm256_fmadd_ps(a, b, acc); }
static inline vec vraw(const float *p) { return _mm256_loadu_ps(p); }
template <class T> static inline vec vweights(const T *p, float) { return vload(p); }

#endif

constexpr int TILE_COLUMNS = 2 * W;
template <class T> using operand = typename Operand<T>::type;

static inline vec vzero() { return vset(0); }

// 2^x for x <= 0 or little above; below -126 it is 0 or nearly so. Error under 2 units in the
// last place (polynomial of 2^f on [-1/2, 1/2]).
static inline vec vexp2(vec x) {
  x = vmax(x, vset(-126.0f));
  vec whole = vround(x), f = vsub(x, whole);
  vec y = vset(1.5403530e-4f);
  y = vfma(y, f, vset(1.3333558e-3f));
  y = vfma(y, f, vset(9.6181291e-3f));
  y = vfma(y, f, vset(5.5504109e-2f));
  y = vfma(y, f, vset(2.4022651e-1f));
  y = vfma(y, f, vset(6.9314718e-1f));
  y = vfma(y, f, vset(1.0f));
  return vscale2(y, whole);
}
