// Keys and values rounded to 8 or 4 bits, what they stand for, and one token's attention to them, in
// float32 and in whole numbers: for instruction sets that this host runs in an emulator alone.
//
//   kv_attention GIVEN FOUND
//
// GIVEN holds, as int64: bits, head_dim, group, tokens, bf16; then as float32 the cap of the scores (0:
// none), the queries [group][D], keys [tokens][D] and values [tokens][D]. To FOUND go the bytes of a
// cache of one head, then as float32 the keys and values read back, and attention's output [group][D]
// twice: over what was read back, and over the codes.
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "attention_codes.h"

static FILE *file, *out;

template <class V> static std::vector<V> given(int64_t count) {
  std::vector<V> found(count);
  if (fread(found.data(), sizeof(V), count, file) != (size_t)count) exit(2);
  return found;
}

template <class V> static void put(const V *from, int64_t count) {
  fwrite(from, sizeof(V), count, out);
}

// Round x [n][D], of float32 that T holds exactly, into the slots of a head.
template <class T> static void round_all(const Form &form, const std::vector<float> &x, Tokens to) {
  const int64_t d = form.head_dim;
  std::vector<T> exact(x.size());
  for (size_t i = 0; i < x.size(); i += W) vstore(&exact[i], vload(&x[i]));
  for (int64_t j = 0; j < (int64_t)x.size() / d; j++) write_token(form, &exact[j * d], to.skip(j));
}

// Outputs of queries [group][D] over n tokens, turned back.
template <class Attend>
static void attend(const Form &form, int64_t group, Attend part) {
  const int64_t d = form.head_dim;
  std::vector<float> peak(group, HIDDEN), sum(group, 0.0f), sums(group * d, 0.0f);
  part(Partial{peak.data(), sum.data(), sums.data()});
  for (int64_t g = 0; g < group; g++) {
    for (int64_t i = 0; i < d; i++) sums[g * d + i] /= sum[g];
    if (form.rotated()) hadamard(&sums[g * d], d);
  }
  put(sums.data(), group * d);
}

int main(int, char **words) {
  file = fopen(words[1], "rb"), out = fopen(words[2], "wb");
  const std::vector<int64_t> sizes = given<int64_t>(5);
  const int64_t bits = sizes[0], d = sizes[1], group = sizes[2], n = sizes[3];
  const float cap = given<float>(1)[0];
  std::vector<float> q = given<float>(group * d);
  const std::vector<float> k = given<float>(n * d), v = given<float>(n * d);
  const Form form(bits == 8 ? CACHE_INT8 : CACHE_INT4, d, sizes[4] ? 2 : 4);

  const int64_t half = form.bytes(1, n);
  std::vector<char> memory(2 * half);
  const Tokens keys = form.slots(memory.data(), 1, n, 0), values = form.slots(&memory[half], 1, n, 0);
  sizes[4] ? round_all<bf16>(form, k, keys) : round_all<float>(form, k, keys);
  sizes[4] ? round_all<bf16>(form, v, values) : round_all<float>(form, v, values);
  put(memory.data(), memory.size());

  std::vector<float> read_keys(n * d), read_values(n * d);
  read_tokens(form, keys, n, read_keys.data());
  read_tokens(form, values, n, read_values.data());
  put(read_keys.data(), n * d);
  put(read_values.data(), n * d);

  for (int64_t g = 0; form.rotated() && g < group; g++) hadamard(&q[g * d], d);
  attend(form, group, [&](Partial to) {
    attend_one(q.data(), group, d, read_keys.data(), read_values.data(), d, n, to, cap);
  });
  Asked asked;
  asked.take(q.data(), group, d);
  attend(form, group, [&](Partial to) {
    const int64_t first = n / 3;  // in two parts, as where a ring begins anew
    for (int64_t part = 0; part < 2; part++) {
      const Tokens a = keys.skip(part * first), b = values.skip(part * first);
      const int64_t count = part ? n - first : first;
      if (bits == 8) attend_codes<int8_t>(asked, group, d, a, b, count, to, cap);
      else attend_codes<Nibbles>(asked, group, d, a, b, count, to, cap);
    }
  });
  return fclose(out);
}
