// One vector type of W floats, whatever the instruction set, and what the kernels do with it. Each
// set is a header of its own that defines, besides plain arithmetic on `vec`:
//   W, TILE_ROWS, REGISTERS   floats of a vector, rows of a product's tile, vector registers
//   Operand<T>, LANE<A>       what numbers stored as T are multiplied as, and how many of them are
//                             the 32 bits of a lane
//   vweights, vlane, vdot     weights as operands, one lane of operands in every lane, their product
//   vtranspose                W vectors as a matrix
//   ivec, idot_block, ...     whole numbers of 8 bits, multiplied as such
//   icodes, izip, vinorder    keys and values of 8 and 4 bits, by rows and by columns
//   vswap                     a vector's lanes, each beside its partner
#pragma once
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

template <class T> struct Operand { typedef float type; };
template <class A> constexpr int LANE = 4 / sizeof(A);

// Two numbers of 4 bits, 0 to 15: the first in the low half.
struct Nibbles {
  uint8_t pair;
};

// Numbers of a block of whole-number activations, which share a scale.
constexpr int64_t BLOCK = 64;

#if defined(__AVX512BF16__)
#include "simd_avx512bf16.h"
#elif defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#error "no vector layer for this instruction set"
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
