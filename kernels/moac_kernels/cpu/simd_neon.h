// NEON with dot products of 8-bit numbers (Armv8.2): vectors of 128 bits, every multiplicand widened
// to float32.
#pragma once
#include <arm_neon.h>

typedef float32x4_t vec;
constexpr int W = 4;
constexpr int REGISTERS = 32;
constexpr int TILE_ROWS = 12;  // 24 accumulators, 2 operands and a broadcast fill 27 of 32 registers

static inline vec vset(float x) { return vdupq_n_f32(x); }
static inline vec vload(const float *p) { return vld1q_f32(p); }
static inline vec vload(const bf16 *p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
static inline vec vload(const int8_t *p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
static inline void vstore(float *p, vec x) { vst1q_f32(p, x); }
static inline void vstore(bf16 *p, vec x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  vst1_u16(p, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
}
static inline vec vadd(vec a, vec b) { return vaddq_f32(a, b); }
static inline vec vsub(vec a, vec b) { return vsubq_f32(a, b); }
static inline vec vmul(vec a, vec b) { return vmulq_f32(a, b); }
static inline vec vdiv(vec a, vec b) { return vdivq_f32(a, b); }
static inline vec vmax(vec a, vec b) { return vmaxq_f32(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline float vsum(vec x) { return vaddvq_f32(x); }
static inline float vpeak(vec x) { return vmaxvq_f32(x); }
static inline vec vround(vec x) { return vrndnq_f32(x); }
static inline vec vscale2(vec x, vec n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
static inline float from_half(uint16_t x) {
  __fp16 value;
  __builtin_memcpy(&value, &x, 2);
  return (float)value;
}

static inline vec vlane(const float *p) { return vld1q_dup_f32(p); }
static inline vec vdot(vec acc, vec a, vec b, float) { return vfmaq_f32(acc, a, b); }
static inline vec vraw(const float *p) { return vld1q_f32(p); }
template <class T> static inline vec vweights(const T *p, float) { return vload(p); }

// The transpose of 4 by 4 lanes.
static inline void vtranspose(vec *x) {
  const float32x4x2_t a = vtrnq_f32(x[0], x[1]), b = vtrnq_f32(x[2], x[3]);
  x[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  x[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  x[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  x[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

// ---- whole numbers of 8 bits, both sides signed

typedef int32x4_t ivec;

static inline vec vfloat(ivec x) { return vcvtq_f32_s32(x); }
static inline ivec iraw(const int8_t *p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
// lanes that sum to a . w of a BLOCK
static inline ivec idot_block(const int8_t *a, const int8_t *w, int32_t) {
  ivec sum = vdupq_n_s32(0);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) sum = vdotq_s32(sum, vld1q_s8(a + 16 * i), vld1q_s8(w + 16 * i));
  return sum;
}
// the same in every lane of W columns at once, of four numbers at a time: where it begins, a step
static inline ivec ibegin(int32_t) { return vdupq_n_s32(0); }
static inline ivec istep(ivec acc, const int8_t *a, ivec w) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return vdotq_s32(acc, vreinterpretq_s8_s32(vdupq_n_s32(four)), vreinterpretq_s8_s32(w));
}
static inline vec vweights(const int8_t *p, int8_t) { return vreinterpretq_f32_s8(vld1q_s8(p)); }
// W numbers, rounded to nearest
static inline void vstore(int8_t *p, vec x) {
  const int16x4_t half = vmovn_s32(vcvtnq_s32_f32(x));
  const int8x8_t narrow = vmovn_s16(vcombine_s16(half, half));
  vst1_lane_s32((int32_t *)p, vreinterpret_s32_s8(narrow), 0);
}
static inline vec vabs(vec x) { return vabsq_f32(x); }
static inline int32_t isum_group(const int8_t *a) {  // of 32 numbers
  const ivec first = vdotq_s32(vdupq_n_s32(0), vld1q_s8(a), vdupq_n_s8(1));
  return vaddvq_s32(vdotq_s32(first, vld1q_s8(a + 16), vdupq_n_s8(1)));
}

// ---- numbers of 4 bits, two a byte: acc plus a . w of a BLOCK, each of its two groups by its scale
static inline vec ipacked_block(vec acc, const int8_t *a, const uint8_t *w, const float *scales) {
  ivec low = vdupq_n_s32(0), high = low;
#pragma GCC unroll 2
  for (int i = 0; i < 32; i += 16) {
    const uint8x16_t bytes = vld1q_u8(w + i);
    low = vdotq_s32(low, vld1q_s8(a + i), vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))));
    high = vdotq_s32(high, vld1q_s8(a + 32 + i), vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)));
  }
  acc = vfma(vfloat(low), vset(scales[0]), acc);
  return vfma(vfloat(high), vset(scales[1]), acc);
}
// of two bfloat16 in each lane, as they lie in memory, the first or the second
static inline vec vfirst_halves(vec x) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 16));
}
static inline vec vsecond_halves(vec x) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0xffff0000)));
}

// ---- keys and values of 8 bits, or of 4, two a byte: 16 numbers side by side, `count` of them
static inline ivec icodes(const int8_t *p, int64_t) { return iraw(p); }
static inline ivec icodes(const Nibbles *p, int64_t) {
  const uint16x8_t wide = vmovl_u8(vld1_u8((const uint8_t *)p));
  const uint8x16_t both = vreinterpretq_u8_u16(vorrq_u16(wide, vshlq_n_u16(wide, 4)));
  return vreinterpretq_s32_u8(vandq_u8(both, vdupq_n_u8(15)));
}
static inline ivec izero() { return vdupq_n_s32(0); }
template <class Code> static inline ivec ioperand(ivec x, Code) { return x; }
template <class Code> static inline ivec ibegin(int32_t, Code) { return izero(); }
template <class Code> static inline ivec istep(ivec acc, const int8_t *a, ivec w, Code) {
  return istep(acc, a, w);
}
// the same of weights; a row's columns, at most 32, share them
template <bool halves>
static inline ivec iweigh(ivec acc, const int8_t *a, const int8_t *, ivec w) {
  return istep(acc, a, w);
}
static inline ivec ijoin(ivec high, ivec low) {  // 128 high + low
  return vaddq_s32(vshlq_n_s32(high, 7), low);
}
static inline vec vbits(ivec x) { return vreinterpretq_f32_s32(x); }
// Four rows to their columns, four numbers a lane; vinorder puts what was added up in such lanes in
// the order of the columns.
static inline void izip(ivec *x) {
  const int8x16x2_t a = vzipq_s8(vreinterpretq_s8_s32(x[0]), vreinterpretq_s8_s32(x[1]));
  const int8x16x2_t b = vzipq_s8(vreinterpretq_s8_s32(x[2]), vreinterpretq_s8_s32(x[3]));
  const int16x8x2_t low = vzipq_s16(vreinterpretq_s16_s8(a.val[0]), vreinterpretq_s16_s8(b.val[0]));
  const int16x8x2_t high = vzipq_s16(vreinterpretq_s16_s8(a.val[1]), vreinterpretq_s16_s8(b.val[1]));
  x[0] = vreinterpretq_s32_s16(low.val[0]);
  x[1] = vreinterpretq_s32_s16(low.val[1]);
  x[2] = vreinterpretq_s32_s16(high.val[0]);
  x[3] = vreinterpretq_s32_s16(high.val[1]);
}
static inline void vinorder(vec *) {}

// Each lane's partner: the one whose number differs in the bit `stride`.
template <int stride> static inline vec vswap(vec x) {
  return stride == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
}
