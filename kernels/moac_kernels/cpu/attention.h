// Attention of query rows that share one KV head over runs of keys that lie in one piece, both in
// memory and in position. What a query cannot see is never read, but for the edges of a tile.
#pragma once
#include "abi.h"
#include "codes.h"
#include "matmul.h"

constexpr int64_t FAR = INT64_C(1) << 40;
constexpr int MOST_RUNS = 16;
constexpr int64_t KEY_BLOCK = 128;
constexpr int64_t TILE_QUERIES = 192;  // rows of a tile: queries times group
constexpr float HIDDEN = -1e30f;       // not infinite: a row may begin with keys it cannot see

static inline int64_t tile_tokens(int64_t group) { return larger(1, TILE_QUERIES / group); }

// Keys and values of `count` adjacent tokens from position `first` on. A query sees those less than
// `reach` before it.
struct Run {
  Tokens keys, values;
  int64_t first, count, reach;

  // `n` of them from the one numbered `from` on.
  Run part(int64_t from, int64_t n) const {
    return {keys.skip(from), values.skip(from), first + from, n, reach};
  }
};

struct Runs {
  Run run[MOST_RUNS];
  int count = 0;

  void add(Tokens keys, Tokens values, int64_t first, int64_t count_, int64_t reach) {
    if (count_ > 0) run[count++] = {keys, values, first, count_, reach};
  }

  // Keep what queries at positions `from` to `to` may see.
  void clip(int64_t from, int64_t to) {
    int kept = 0;
    for (int i = 0; i < count; i++) {
      const Run r = run[i];
      const int64_t low = larger(r.first, from - r.reach + 1);
      const int64_t high = smaller(r.first + r.count, to + 1);
      if (low < high) run[kept++] = r.part(low - r.first, high - low);
    }
    count = kept;
  }

  int64_t tokens() const {
    int64_t sum = 0;
    for (int i = 0; i < count; i++) sum += run[i].count;
    return sum;
  }
};

static inline int64_t window_of(const Cache &cache) { return cache.window ? cache.window : FAR; }

// Sinks stay in sight as far as the checkpoint's own window allows, other tokens as the span does.
static inline int64_t reach_of(const Cache &cache, int64_t position) {
  int64_t window = window_of(cache);
  return position < cache.sink ? window : smaller(window, cache.size - cache.sink);
}

static inline int64_t slot_of(const Cache &cache, int64_t place) {
  return place < cache.sink ? place : cache.sink + (place - cache.sink) % (cache.size - cache.sink);
}

// `count` tokens from position `first` on, cut where the reach changes.
static inline void add_positions(Runs &runs, const Cache &cache, Tokens keys, Tokens values,
                                 int64_t first, int64_t count) {
  const int64_t sinks = smaller(count, larger(0, cache.sink - first));
  runs.add(keys, values, first, sinks, reach_of(cache, 0));
  runs.add(keys.skip(sinks), values.skip(sinks), first + sinks, count - sinks,
           reach_of(cache, cache.sink));
}

// The slots of a head, the keys' or the values'.
static inline Tokens slots_of(const Cache &cache, const Form &form, void *base, int64_t head) {
  return form.slots(base, cache.heads, cache.size, head - cache.first);
}

// The tokens a row holds of one head after it was fed `length`: sinks, then the ring, oldest first.
static inline void add_held(Runs &runs, const Cache &cache, const Form &form, int64_t head,
                            int64_t length) {
  const Tokens keys = slots_of(cache, form, cache.keys, head);
  const Tokens values = slots_of(cache, form, cache.values, head);
  const int64_t gap = cache.gap, shift = cache.shift, places = length - shift;
  const int64_t ring = cache.size - cache.sink;
  int64_t place = 0;
  while (place < places) {
    if (place == cache.sink) place = larger(place, places - ring);
    // up to the end of the sinks, of the ring's memory or of the tokens before the gap
    const int64_t slot = slot_of(cache, place);
    int64_t stop = smaller(places, place < cache.sink ? cache.sink : place + cache.size - slot);
    if (place < gap) stop = smaller(stop, gap);
    add_positions(runs, cache, keys.skip(slot), values.skip(slot),
                  place < gap ? place : place + shift, stop - place);
    place = stop;
  }
}

// ---- one query token: its group of heads reads each key once ----

// Running softmax of G query rows: `peak`, `sum` and the weighted values `out` [G][D].
struct Partial {
  float *peak, *sum, *out;
};

constexpr int64_t DECODE_BLOCK = 64;
constexpr int MOST_GROUP = 64;

// part(how many, first) for all of a group's queries, at most `most` and 4 at a time. How many is
// known to the compiler.
template <int N> struct Count {
  constexpr int operator()() const { return N; }
};
template <int most, class Part> static inline void by_queries(int64_t group, Part part) {
  for (int64_t g = 0; g < group;) {
    const int64_t left = group - g;
    if (most >= 4 && left >= 4) part(Count<most >= 4 ? 4 : 1>(), g), g += 4;
    else if (most >= 3 && left >= 3) part(Count<most >= 3 ? 3 : 1>(), g), g += 3;
    else if (most >= 2 && left >= 2) part(Count<most >= 2 ? 2 : 1>(), g), g += 2;
    else part(Count<1>(), g), g += 1;
  }
}

// out[g][d] += weights[g] . values[.][d], two tokens at a time in the dot product's pairs.
template <int G, class A>
static inline void weigh_pairs(const A *values, int64_t stride, int64_t n, int64_t d,
                               const A *weights, int64_t ldw, float *out) {
  for (int64_t i = 0; i < d; i += 2 * W) {
    vec low[G], high[G];
    for (int g = 0; g < G; g++) low[g] = high[g] = vzero();
    for (int64_t j = 0; j < n; j += 2) {
      const A *at = values + j * stride + i;
      vec lo, hi;
      vzip(at, j + 1 < n ? at + stride : nullptr, d - i, lo, hi);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        vec p = vlane(weights + g * ldw + j);
        low[g] = vdot(low[g], p, lo, A());
        high[g] = vdot(high[g], p, hi, A());
      }
    }
    for (int g = 0; g < G; g++) {
      float *to = out + g * d + i;
      vunzip(low[g], high[g], A());
      vstore(to, vadd(vload(to), low[g]));
      if (d - i >= 2 * W) vstore(to + W, vadd(vload(to + W), high[g]));
    }
  }
}

template <int G, class T>
static inline void weigh_each(const T *values, int64_t stride, int64_t n, int64_t d,
                              const float *weights, int64_t ldw, float *out) {
  for (int64_t i = 0; i < d; i += W) {
    vec acc[G];
    for (int g = 0; g < G; g++) acc[g] = vload(out + g * d + i);
    for (int64_t j = 0; j < n; j++) {
      vec v = vload(values + j * stride + i);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) acc[g] = vfma(vset(weights[g * ldw + j]), v, acc[g]);
    }
    for (int g = 0; g < G; g++) vstore(out + g * d + i, acc[g]);
  }
}

template <int G, class A, class T>
static inline void weigh(const T *values, int64_t stride, int64_t n, int64_t d, const A *weights,
                         int64_t ldw, float *out) {
  if constexpr (LANE<A> == 2) weigh_pairs<G>(values, stride, n, d, weights, ldw, out);
  else weigh_each<G>(values, stride, n, d, weights, ldw, out);
}

// Take n scores of a row (row length `ld`) into its running softmax: their weights, under the new
// peak, go to `weights`, padded with zeros (or nearly) to whole vectors; out is scaled to match.
template <class A>
static inline void soften(float *scores, int64_t ld, int64_t n, int64_t row, Partial to, int64_t d,
                          A *weights) {
  float *s = scores + row * ld;
  const int64_t end = padded(n, W);
  for (int64_t j = n; j < end; j++) s[j] = HIDDEN;
  vec peak = vset(to.peak[row]);
  for (int64_t j = 0; j < end; j += W) peak = vmax(peak, vload(s + j));
  const float top = vpeak(peak);
  vec sum = vzero();
  for (int64_t j = 0; j < end; j += W) {
    vec p = vexp2(vsub(vload(s + j), vset(top)));
    sum = vadd(sum, p);
    vstore(weights + row * ld + j, p);
  }
  if (top > to.peak[row]) {
    float scale[W];
    vstore(scale, vexp2(vset(to.peak[row] - top)));
    to.sum[row] *= scale[0];
    for (int64_t i = 0; i < d; i += W)
      vstore(to.out + row * d + i, vmul(vload(to.out + row * d + i), vset(scale[0])));
    to.peak[row] = top;
  }
  to.sum[row] += vsum(sum);
}

// Scores become cap tanh(score / cap), both in powers of two; n of them, padded to whole vectors.
static inline void cap_scores(float *s, int64_t n, float cap) {
  const vec slope = vset(2 * 1.44269504f / cap), one = vset(1), most = vset(-60);
  for (int64_t j = 0; j < n; j += W) {
    vec x = vmax(vmul(vload(s + j), slope), most);
    const vec power = vexp2(vsub(vzero(), vmax(vsub(vzero(), x), most)));
    vstore(s + j, vmul(vset(cap), vdiv(vsub(power, one), vadd(power, one))));
  }
}

// Scores of G query rows q [G][D] with n keys: scores[g][j], rows DECODE_BLOCK apart.
template <int G, class A, class T>
static inline void score(const A *q, int64_t d, const T *keys, const T *values, int64_t stride,
                         int64_t n, float *scores) {
  for (int64_t j = 0; j < n; j++) {
    for (int64_t i = 0; i < d; i += 64 / sizeof(T))  // the values come next
      __builtin_prefetch(values + j * stride + i);
    dots<G, 1>(q, d, keys + j * stride, 0, d, scores + j, DECODE_BLOCK, DECODE_BLOCK * stride);
  }
}

// Add n keys, all seen, to the running softmax of `group` rows q [group][D], scaled for 2^x.
// `cap`: of the scores, 0 for none.
template <class A, class T>
static void attend_one(const A *q, int64_t group, int64_t d, const T *keys, const T *values,
                       int64_t stride, int64_t n, Partial to, float cap) {
  alignas(64) float scores[MOST_GROUP * DECODE_BLOCK];
  alignas(64) A weights[MOST_GROUP * DECODE_BLOCK];
  for (int64_t j = 0; j < n; j += DECODE_BLOCK) {
    const int64_t block = smaller(DECODE_BLOCK, n - j);
    const T *k = keys + j * stride, *v = values + j * stride;
    by_queries<4>(group, [&](auto count, int64_t g) {
      score<count()>(q + g * d, d, k, v, stride, block, scores + g * DECODE_BLOCK);
    });
    for (int64_t g = 0; cap && g < group; g++) cap_scores(scores + g * DECODE_BLOCK, block, cap);
    for (int64_t g = 0; g < group; g++) soften(scores, DECODE_BLOCK, block, g, to, d, weights);
    by_queries<4>(group, [&](auto count, int64_t g) {
      weigh<count()>(v, stride, block, d, weights + g * DECODE_BLOCK, DECODE_BLOCK, to.out + g * d);
    });
  }
}

// ---- many query tokens: tiles of queries against blocks of keys ----

// Values [n][D] as a packed operand for the first TILE_COLUMNS of `d` columns, in lanes of tokens.
template <class A, class T>
static inline void pack_values(const T *values, int64_t stride, int64_t n, int64_t d, A *to) {
  for (int64_t j = 0; j < n; j += LANE<A>, to += TILE_COLUMNS * LANE<A>) {
    const T *at = values + j * stride;
    if constexpr (LANE<A> == 2) {
      vec low, high;
      vzip(at, j + 1 < n ? at + stride : nullptr, d, low, high);
      vunzip(low, high, A());
      vstore((float *)to, low);
      vstore((float *)to + W, high);
    } else {
      for (int64_t i = 0; i < TILE_COLUMNS; i += W)
        vstore(to + i, i < d ? vload(at + i) : vzero());
    }
  }
}

// Memory of one thread for a tile of `rows` query rows.
template <class A> struct TileMemory {
  A *q;           // [rows][D]
  float *scores;  // [rows][KEY_BLOCK]
  A *weights;     // [rows][KEY_BLOCK]
  A *pack;        // the keys, or a panel of the values
  A *keys, *values;  // [KEY_BLOCK][D]: what rounded ones stand for
  Partial to;     // [rows], out [rows][padded D]
};

// Keys and values of adjacent tokens of one type, `stride` elements apart.
template <class T> struct Block {
  const T *keys, *values;
  int64_t stride;
};

// take(block, first, count) for some tokens at a time of a run: as they lie, or what they stand for.
template <class T, class A, class Take>
static inline void each_block(const TileMemory<A> &at, const Form &form, const Run &run, Take take) {
  const int64_t d = form.head_dim;
  for (int64_t j = 0; j < run.count; j += KEY_BLOCK) {
    const Run part = run.part(j, smaller(KEY_BLOCK, run.count - j));
    if (form.plain()) {
      take(Block<T>{(const T *)part.keys.numbers, (const T *)part.values.numbers,
                    part.keys.stride / (int64_t)sizeof(T)}, part);
    } else {
      read_tokens(form, part.keys, part.count, at.keys);
      read_tokens(form, part.values, part.count, at.values);
      take(Block<A>{at.keys, at.values, d}, part);
    }
  }
}

// Add a block of keys to the running softmax of a tile: rows are `tokens` queries from position
// `from` on, times `group`. `ld`: length of a row of out. `cap`: of the scores, 0 for none.
template <class A, class T>
static void attend_block(const TileMemory<A> &at, int64_t tokens, int64_t group, int64_t from,
                         int64_t d, int64_t ld, const Block<T> &block, const Run &run, float cap) {
  const int64_t rows = tokens * group, n = run.count;
  for (int64_t c = 0; c < n; c += TILE_COLUMNS) {
    pack_columns(block.keys + c * block.stride, block.stride, n - c, d, at.pack);
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
      tile(d / LANE<A>, at.q + r * d, d, at.pack, at.scores + r * KEY_BLOCK + c, KEY_BLOCK, false);
  }
  const bool edge = run.first + n - 1 > from || from + tokens - 1 - run.first >= run.reach;
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t query = from + t;
    const int64_t low = smaller(n, larger(0, query - run.reach + 1 - run.first));
    const int64_t high = larger(0, smaller(n, query + 1 - run.first));
    for (int64_t row = t * group; row < (t + 1) * group; row++) {
      float *s = at.scores + row * KEY_BLOCK;
      if (cap) cap_scores(s, n, cap);
      if (edge) {
        for (int64_t j = 0; j < low; j++) s[j] = HIDDEN;
        for (int64_t j = high; j < n; j++) s[j] = HIDDEN;
      }
      soften(at.scores, KEY_BLOCK, n, row, at.to, ld, at.weights);
    }
  }
  for (int64_t i = 0; i < d; i += TILE_COLUMNS) {
    pack_values(block.values + i, block.stride, n, d - i, at.pack);
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
      tile((n + LANE<A> - 1) / LANE<A>, at.weights + r * KEY_BLOCK, KEY_BLOCK, at.pack,
           at.to.out + r * ld + i, ld, true);
  }
}

// Attention of a tile over all runs, clipped to it already. `sinks` [group]: logits beside the scores
// in powers of two, null for none. T: the type of what is not rounded.
template <class T, class A>
static void attend_tile(const TileMemory<A> &at, const Form &form, int64_t tokens, int64_t group,
                        int64_t from, int64_t ld, const Runs &runs, float cap, const float *sinks) {
  for (int64_t row = 0; row < tokens * group; row++) {
    at.to.peak[row] = sinks ? sinks[row % group] : HIDDEN;
    at.to.sum[row] = sinks ? 1 : 0;
    for (int64_t i = 0; i < ld; i++) at.to.out[row * ld + i] = 0;
  }
  for (int i = 0; i < runs.count; i++)
    each_block<T>(at, form, runs.run[i], [&](const auto &block, const Run &part) {
      attend_block(at, tokens, group, from, form.head_dim, ld, block, part, cap);
    });
}
