// Keys and values of 8 and 4 bits: how they lie, how they are rounded and what they stand for, to the
// bit as docs/FORMAT.md says ("Keys and values in 8 and 4 bits").
#pragma once
#include <string.h>

#include "abi.h"
#include "matmul.h"

constexpr int64_t MOST_HEAD_DIM = 256;
constexpr int64_t KV_GROUP = 32;  // numbers of 4 bits that share a scale and a minimum
constexpr int64_t MOST_KV_GROUPS = MOST_HEAD_DIM / KV_GROUP;
constexpr int64_t KV_ALIGNMENT = 16;  // bytes that a head's codes, and its scales, are padded to

// What a byte of codes holds, int8_t or Nibbles, and how many numbers that is.
template <class Code> constexpr bool GROUPED = false;
template <> constexpr bool GROUPED<Nibbles> = true;
template <class Code> constexpr int64_t PER_BYTE = GROUPED<Code> ? 2 : 1;

// Numbers and scales of one head's adjacent tokens, keys or values: bytes from one to the next.
// Whose type is the engine's have no scales.
struct Tokens {
  char *numbers, *scales;
  int64_t stride, scale_stride;

  Tokens skip(int64_t n) const {
    return {numbers + n * stride, scales + n * scale_stride, stride, scale_stride};
  }
};

// Bytes of the key, or the value, of one token and head.
struct Form {
  int64_t format, head_dim, numbers, scales;

  Form(int64_t format_, int64_t d, int64_t itemsize) : format(format_), head_dim(d) {
    numbers = format == CACHE_PLAIN ? d * itemsize : format == CACHE_INT8 ? d : d / 2;
    scales = format == CACHE_PLAIN ? 0 : format == CACHE_INT8 ? 2 : groups() * 4;
  }

  bool plain() const { return format == CACHE_PLAIN; }
  bool rotated() const { return format == CACHE_INT4; }
  int64_t groups() const { return (head_dim + KV_GROUP - 1) / KV_GROUP; }

  // Bytes of the numbers, and of the scales, of a head of `size` slots; of both, of several heads.
  int64_t own(int64_t size) const { return plain() ? size * numbers : padded(size * numbers, KV_ALIGNMENT); }
  int64_t beside(int64_t size) const { return padded(size * scales, KV_ALIGNMENT); }
  int64_t bytes(int64_t heads, int64_t size) const { return heads * (own(size) + beside(size)); }

  // Of `heads` heads of `size` slots from `base` on: the numbers of all, then the scales of all.
  Tokens slots(void *base, int64_t heads, int64_t size, int64_t head) const {
    char *at = (char *)base;
    return {at + head * own(size), at + heads * own(size) + head * beside(size), numbers, scales};
  }

  // Of tokens `stride` bytes apart, each with its scales behind its numbers.
  Tokens rows(void *base, int64_t stride) const {
    return {(char *)base, (char *)base + numbers, stride, stride};
  }

  void copy(Tokens to, Tokens from) const {
    memcpy(to.numbers, from.numbers, numbers);
    memcpy(to.scales, from.scales, scales);
  }
};

// The largest bfloat16 number that is not above x, and the least that is not below.
static inline bf16 narrow_down(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bf16)((bits + (bits >> 31 ? 0xffff : 0)) >> 16);
}
static inline bf16 narrow_up(float x) { return narrow_down(-x) ^ 0x8000; }

// ---- the rotation of what has 4 bits

// In the first lanes of pairs 1, 2, 4 and 8 apart, and in the second.
static const float SIGNS[4][16] = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};

// Sums in the first lanes of pairs, differences in the second; a factor of one rounds nothing.
template <int stride> static inline vec add_pairs(vec x) {
  constexpr int row = stride == 1 ? 0 : stride == 2 ? 1 : stride == 4 ? 2 : 3;
  return vfma(x, vload(SIGNS[row]), vswap<stride>(x));
}

// The orthonormal Hadamard rotation of x [d], in blocks of the largest power of two that divides d,
// at most 64. It undoes itself.
static inline void hadamard(float *x, int64_t d) {
  const int64_t block = smaller(64, d & -d);
  for (int64_t i = 0; i < d; i += W) {
    vec y = add_pairs<2>(add_pairs<1>(vload(x + i)));
    if constexpr (W > 4) y = add_pairs<4>(y);
    if constexpr (W > 8) y = add_pairs<8>(y);
    vstore(x + i, y);
  }
  for (int64_t stride = W; stride < block; stride *= 2)
    for (int64_t first = 0; first < d; first += 2 * stride)
      for (int64_t i = first; i < first + stride; i += W) {
        const vec a = vload(x + i), b = vload(x + i + stride);
        vstore(x + i, vadd(a, b));
        vstore(x + i + stride, vsub(a, b));
      }
  const vec share = vset(block == 64 ? 0.125f : block == 32 ? 0.17677669529663687f : 0.25f);
  for (int64_t i = 0; i < d; i += W) vstore(x + i, vmul(vload(x + i), share));
}

// ---- rounding and what it leaves

static inline vec over(vec x, float scale) { return scale > 0 ? vdiv(x, vset(scale)) : vzero(); }

static inline void round_token(const float *x, int64_t d, int8_t *to, bf16 *scale) {
  vec most = vzero();
  for (int64_t i = 0; i < d; i += W) most = vmax(most, vabs(vload(x + i)));
  *scale = narrow_up(vpeak(most) / 127);
  for (int64_t i = 0; i < d; i += W) vstore(to + i, over(vload(x + i), widen(*scale)));
}

static inline void round_token(const float *x, int64_t d, Nibbles *to, bf16 *scales) {
  for (int64_t first = 0; first < d; first += KV_GROUP, scales += 2) {
    const int64_t count = smaller(KV_GROUP, d - first);
    vec most = vload(x + first), least = vsub(vzero(), most);
    for (int64_t i = first + W; i < first + count; i += W) {
      most = vmax(most, vload(x + i));
      least = vmax(least, vsub(vzero(), vload(x + i)));
    }
    scales[1] = narrow_down(0 - vpeak(least));
    const float low = widen(scales[1]);
    scales[0] = narrow_up((vpeak(most) - low) / 15);
    int8_t numbers[KV_GROUP];
    for (int64_t i = 0; i < count; i += W)
      vstore(numbers + i, over(vsub(vload(x + first + i), vset(low)), widen(scales[0])));
    for (int64_t i = 0; i < count; i += 2)
      (to++)->pair = (uint8_t)(numbers[i] | numbers[i + 1] << 4);
  }
}

// Round one token's key or value, x [d] of the engine's type.
template <class T> static inline void write_token(const Form &form, const T *x, Tokens to) {
  const int64_t d = form.head_dim;
  float wide[MOST_HEAD_DIM];
  for (int64_t i = 0; i < d; i += W) vstore(wide + i, vload(x + i));
  if (form.rotated()) hadamard(wide, d);
  if (form.rotated()) round_token(wide, d, (Nibbles *)to.numbers, (bf16 *)to.scales);
  else round_token(wide, d, (int8_t *)to.numbers, (bf16 *)to.scales);
}

template <class P> static inline void read_token(int64_t d, const int8_t *from, const bf16 *scale, P *to) {
  for (int64_t i = 0; i < d; i += W) vstore(to + i, vmul(vload(from + i), vset(widen(*scale))));
}

template <class P> static inline void read_token(int64_t d, const Nibbles *from, const bf16 *scales, P *to) {
  for (int64_t first = 0; first < d; first += 4 * W) {
    alignas(64) int8_t numbers[4 * W];
    vstore((float *)numbers, vbits(icodes(from + first / 2, d - first)));
    for (int64_t i = first; i < smaller(d, first + 4 * W); i += W) {
      const bf16 *pair = scales + i / KV_GROUP * 2;
      vstore(to + i, vfma(vload(numbers + i - first), vset(widen(pair[0])), vset(widen(pair[1]))));
    }
  }
}

// What n rounded tokens stand for, rotated where they are: [n][d].
template <class P> static void read_tokens(const Form &form, Tokens from, int64_t n, P *to) {
  const int64_t d = form.head_dim;
  for (int64_t j = 0; j < n; j++, to += d) {
    const Tokens token = from.skip(j);
    const bf16 *scales = (const bf16 *)token.scales;
    if (form.rotated()) read_token(d, (const Nibbles *)token.numbers, scales, to);
    else read_token(d, (const int8_t *)token.numbers, scales, to);
  }
}
