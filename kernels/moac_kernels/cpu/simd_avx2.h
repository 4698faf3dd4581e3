// AVX2 with FMA: vectors of 256 bits, every multiplicand widened to float32.
#pragma once
#include <immintrin.h>

typedef __m256 vec;
constexpr int W = 8;
constexpr int REGISTERS = 16;
constexpr int TILE_ROWS = 6;  // 12 accumulators, 2 operands and a broadcast fill 15 of 16 registers

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
static inline float from_half(uint16_t x) { return _cvtsh_ss(x); }

static inline vec vlane(const float *p) { return _mm256_set1_ps(*p); }
static inline vec vdot(vec acc, vec a, vec b, float) { return _mm256_fmadd_ps(a, b, acc); }
static inline vec vraw(const float *p) { return _mm256_loadu_ps(p); }
template <class T> static inline vec vweights(const T *p, float) { return vload(p); }

// The transpose of 8 by 8 lanes.
static inline void vtranspose(vec *x) {
  vec y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) x[i] = y[i];
}

// ---- whole numbers of 8 bits. The product of pairs takes one unsigned side and saturates at 16
// bits: the weights' magnitudes, and activations with the weights' signs. Both are at most 127, so
// a pair is at most 32258 and nothing saturates.

typedef __m256i ivec;

static inline vec vfloat(ivec x) { return _mm256_cvtepi32_ps(x); }
static inline ivec iraw(const int8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline ivec iproduct(ivec a, ivec w) {
  const ivec pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
// lanes that sum to a . w of a BLOCK
static inline ivec idot_block(const int8_t *a, const int8_t *w, int32_t) {
  return _mm256_add_epi32(iproduct(iraw(a), iraw(w)), iproduct(iraw(a + 32), iraw(w + 32)));
}
// W numbers, rounded to nearest
static inline void vstore(int8_t *p, vec x) {
  ivec wide = _mm256_cvtps_epi32(x);
  wide = _mm256_packs_epi32(wide, wide);
  wide = _mm256_packs_epi16(wide, wide);
  const int32_t low = _mm256_extract_epi32(wide, 0), high = _mm256_extract_epi32(wide, 4);
  __builtin_memcpy(p, &low, 4);
  __builtin_memcpy(p + 4, &high, 4);
}
static inline vec vabs(vec x) { return _mm256_andnot_ps(vset(-0.0f), x); }
static inline int32_t isum_group(const int8_t *a) {  // of 32 numbers
  const ivec pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), iraw(a));
  return (int32_t)vsum(vfloat(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));  // exact
}
// the same in every lane of W columns at once, of four numbers at a time: where it begins, a step
static inline ivec ibegin(int32_t) { return _mm256_setzero_si256(); }
static inline ivec istep(ivec acc, const int8_t *a, ivec w) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return _mm256_add_epi32(acc, iproduct(_mm256_set1_epi32(four), w));
}
static inline vec vweights(const int8_t *p, int64_t lanes, int8_t) {
  const ivec inside = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)lanes),
                                         _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_castsi256_ps(_mm256_maskload_epi32((const int *)p, inside));
}

// ---- numbers of 4 bits, two a byte: acc plus a . w of a BLOCK, each of its two groups by its scale
static inline ivec ihalf_product(const int8_t *a, ivec w) {  // a pair is at most 3810
  return _mm256_madd_epi16(_mm256_maddubs_epi16(w, iraw(a)), _mm256_set1_epi16(1));
}
static inline vec ipacked_block(vec acc, const int8_t *a, const uint8_t *w, const float *scales) {
  const ivec bytes = iraw((const int8_t *)w), half = _mm256_set1_epi8(15);
  const ivec low = _mm256_and_si256(bytes, half);
  const ivec high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), half);
  acc = vfma(vfloat(ihalf_product(a, low)), vset(scales[0]), acc);
  return vfma(vfloat(ihalf_product(a + 32, high)), vset(scales[1]), acc);
}
// of two bfloat16 in each lane, as they lie in memory, the first or the second
static inline vec vfirst_halves(vec x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16));
}
static inline vec vsecond_halves(vec x) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), high));
}

// ---- keys and values of 8 bits, or of 4, two a byte: up to 4 W numbers side by side, `count` of
// them, a multiple of 16, and zeros after them: nothing past them is read
static inline ivec icodes(const int8_t *p, int64_t count) {
  return count >= 32 ? iraw(p) : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)p));
}
static inline ivec icodes(const Nibbles *p, int64_t count) {
  const __m128i bytes = count >= 32 ? _mm_loadu_si128((const __m128i *)p) : _mm_loadl_epi64((const __m128i *)p);
  const ivec wide = _mm256_cvtepu8_epi16(bytes);
  return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
}
static inline ivec izero() { return _mm256_setzero_si256(); }
template <class Code> static inline ivec ioperand(ivec x, Code) { return x; }
template <class Code> static inline ivec ibegin(int32_t, Code) { return izero(); }
static inline ivec istep(ivec acc, const int8_t *a, ivec w, int8_t) { return istep(acc, a, w); }
static inline ivec istep(ivec acc, const int8_t *a, ivec w, Nibbles) {  // a pair is at most 3840
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  const ivec pairs = _mm256_maddubs_epi16(w, _mm256_set1_epi32(four));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// the same of signed numbers w with four at `a` that are not below nought; a row's columns, at most
// 32, share them
template <bool halves>
static inline ivec iweigh(ivec acc, const int8_t *a, const int8_t *, ivec w) {  // at most 32258
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  const ivec pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(four), w);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline ivec ijoin(ivec high, ivec low) {  // 128 high + low
  return _mm256_add_epi32(_mm256_slli_epi32(high, 7), low);
}
static inline vec vbits(ivec x) { return _mm256_castsi256_ps(x); }
// Four rows to their columns, four numbers a lane; vinorder puts what was added up in such lanes in
// the order of the columns.
static inline void izip(ivec *x) {
  const ivec a = _mm256_unpacklo_epi8(x[0], x[1]), b = _mm256_unpackhi_epi8(x[0], x[1]);
  const ivec c = _mm256_unpacklo_epi8(x[2], x[3]), d = _mm256_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm256_unpacklo_epi16(a, c);
  x[1] = _mm256_unpackhi_epi16(a, c);
  x[2] = _mm256_unpacklo_epi16(b, d);
  x[3] = _mm256_unpackhi_epi16(b, d);
}
static inline void vinorder(vec *x) {
  const vec a = x[0], b = x[1], c = x[2], d = x[3];
  x[0] = _mm256_permute2f128_ps(a, b, 0x20);
  x[1] = _mm256_permute2f128_ps(c, d, 0x20);
  x[2] = _mm256_permute2f128_ps(a, b, 0x31);
  x[3] = _mm256_permute2f128_ps(c, d, 0x31);
}

// Each lane's partner: the one whose number differs in the bit `stride`.
template <int stride> static inline vec vswap(vec x) {
  if constexpr (stride == 1) return _mm256_permute_ps(x, 0xb1);
  else if constexpr (stride == 2) return _mm256_permute_ps(x, 0x4e);
  else return _mm256_permute2f128_ps(x, x, 1);
}
