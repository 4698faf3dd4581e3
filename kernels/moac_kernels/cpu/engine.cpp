// One step of a decoder, from tokens to logits, in one call: each of any rows adds one token or many.
// Built once per instruction set; model, spans and rows are data.
#include <math.h>
#include <new>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "attention_codes.h"
#include "experts.h"
#include "packed.h"
#include "team.h"

static void *allocate(int64_t bytes) {
  void *memory = aligned_alloc(64, padded(bytes + 64, 64));
  if (memory) memset(memory, 0, bytes);
  return memory;
}

constexpr int64_t LAYER_PHASES = 12;
constexpr int64_t MOST_TILES = 64;   // of a task of a product
constexpr float LOG2_E = 1.44269504f;
constexpr int64_t BLOCK_ROWS = 16;  // tokens of a task that takes them one by one, where many

static inline float power2(float x) {
  float all[W];
  vstore(all, vexp2(vset(x)));
  return all[0];
}
static inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }
static inline float gelu_tanh(float x) {
  return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}
static inline vec silu(vec x) {
  vec power = vmul(vmax(x, vset(-80)), vset(-1.44269504f));
  return vdiv(x, vadd(vset(1), vexp2(power)));
}

// One thread's own memory.
template <class A> struct Desk {
  float *columns, *more;  // [tokens][TILE_COLUMNS]: a block of a product, and of its partner
  TileMemory<A> tile;
  A *unpacked;    // [TILE_COLUMNS][k] of 4-bit weights
  Rounded whole;  // activations of a product that takes them in whole numbers
  char *rounded;  // where those of a few tokens lie
  const A *source;      // what they are of,
  int64_t rounded_at;   // as it stood in this phase since the engine began
  const Walk *walk;
  void *memory;
};

// The columns of a product, cut into tasks: long runs of memory, for each stream begins slowly, and
// where it can be as many for every thread.
struct Split {
  int64_t columns, size = TILE_COLUMNS;

  Split(int64_t n, int64_t threads) : columns(n) {
    const int64_t tiles = (n + TILE_COLUMNS - 1) / TILE_COLUMNS;
    for (int64_t t = 2; t <= MOST_TILES && tiles >= 3 * threads * t; t++)
      if ((tiles + t - 1) / t % threads == 0) size = t * TILE_COLUMNS;
  }

  int64_t tasks() const { return (columns + size - 1) / size; }
};

// RMS norm by a weight [n], of the engine's type, or a layer norm, which may have a bias [n];
// without a weight nothing is normed.
struct Norm {
  const void *weight, *bias;
  float eps, plus;  // what is added to the weight
  bool centred;
};

// What brings some numbers to a mean of nought, where they are to have one, and a mean square of one.
struct Moments {
  float mean, root;
};

template <class T> struct Engine {
  typedef operand<T> A;
  Team team;
  Model model;
  Step step;
  int64_t most_tokens = 0, most_items = 0, pairs = 0, group, width, queries;
  Split by_hidden, by_width, by_vocab;
  Split *by_inner;  // of each layer
  float *x, *qkv, *cosines, *sines, *partial, *peak, *sum;
  float *output;  // [m][hidden] of a sublayer that is normed before it is added
  A *normed, *q, *attended, *inner;
  T *k, *v;
  char *rounded;  // activations in whole numbers, where tokens are many
  int64_t widest;  // k of any product
  int64_t *position, *segment, *done;
  int64_t *piece;  // [layers][segments]: tokens of an item of attention
  uint8_t *lone, *wanted_lone;  // [m]: whether a token, one whose logits are asked for, goes by `few`
  Mixture<A> mixture;
  int64_t most_experts = 0, most_chosen = 0;
  Desk<A> *desks;
  void *memory[32];
  int num_memory = 0;

  Engine(const Model &m, int64_t threads)
      : model(m), width((m.heads + 2 * m.kv_heads) * m.head_dim), by_hidden(m.hidden, threads),
        by_width(width, threads), by_vocab(m.vocab, threads) {
    team.threads = (int)threads;
    team.num_phases = 1 + LAYER_PHASES * m.num_layers + 3;
    for (int64_t l = 0; l < m.num_layers; l++) {
      most_experts = larger(most_experts, m.layers[l].experts);
      most_chosen = larger(most_chosen, m.layers[l].chosen);
    }
    team.phases = (Phase *)allocate(team.num_phases * sizeof(Phase));
    by_inner = (Split *)allocate(m.num_layers * sizeof(Split));
    for (int64_t l = 0; by_inner && l < m.num_layers; l++)
      by_inner[l] = Split(m.layers[l].inner, threads);
    group = m.heads / m.kv_heads;
    queries = m.heads * m.head_dim;
    widest = larger(larger(m.hidden, m.inner), queries);
    desks = (Desk<A> *)calloc(threads, sizeof(Desk<A>));
  }

  ~Engine() {
    release();
    free(desks);
    free(by_inner);
    free(team.phases);
  }

  bool whole() const { return team.phases && by_inner && desks; }

  bool post_norms() const {
    for (int64_t l = 0; l < model.num_layers; l++)
      if (model.layers[l].attn_post_norm || model.layers[l].mlp_post_norm) return true;
    return false;
  }

  // Whether a step's number of tokens chooses the kernel for all of them: where activations and
  // weights have 8 bits, a token beside many costs much more by `few` than by tiles.
  bool by_step() const {
    return sizeof(T) == sizeof(bf16) && model.layers[0].qkv.format == WEIGHTS_INT8;
  }

  // Whether any matrix is of fewer bits than the engine's type.
  bool narrow() const {
    bool any = model.head.format != WEIGHTS_PLAIN;
    for (int64_t l = 0; l < model.num_layers; l++)
      for (const Matrix *weights = &model.layers[l].qkv; weights <= &model.layers[l].down; weights++)
        any = any || weights->format != WEIGHTS_PLAIN;
    return any;
  }

  template <class P> bool take(P *&at, int64_t count) {
    at = (P *)(memory[num_memory++] = allocate(count * sizeof(P)));
    return at != nullptr;
  }

  void release() {
    while (num_memory) free(memory[--num_memory]);
    for (int i = 0; i < team.threads; i++) {
      free(desks[i].memory);
      desks[i].memory = nullptr;
    }
    most_tokens = most_items = pairs = 0;
  }

  // Room for a step of so many tokens, rows and KV tokens a layer. False where memory is short.
  bool reserve(int64_t tokens, int64_t rows, int64_t kv_tokens) {
    const int64_t heads = rows * model.kv_heads, items = kv_tokens / DECODE_BLOCK + heads;
    if (tokens <= most_tokens && items <= most_items && heads <= pairs) return true;
    const int64_t all_tokens = padded(larger(tokens, most_tokens), TILE_ROWS), m = spare(all_tokens);
    const int64_t all_items = larger(items, most_items), all_pairs = larger(heads, pairs);
    release();
    const int64_t d = model.head_dim, kv = model.kv_heads * d, turns = m * model.num_ropes * d / 2;
    bool ok = take(x, m * model.hidden) && take(qkv, m * width) && take(cosines, turns) &&
              take(sines, turns) && take(normed, m * model.hidden) && take(q, m * queries) &&
              (!post_norms() || take(output, m * model.hidden)) && mixtures(m) &&
              take(attended, m * queries) && take(inner, (m + TILE_ROWS) * model.inner) &&
              take(k, m * kv) && take(v, m * kv) &&
              take(rounded, narrow() ? Rounded::bytes(m, widest) : 0) && take(position, m) &&
              take(segment, m) && take(done, all_pairs) && take(lone, m) && take(wanted_lone, m) &&
              take(piece, model.num_layers * (all_pairs / model.kv_heads)) &&
              take(partial, all_items * group * (d + 2));
    for (int i = 0; ok && i < team.threads; i++) ok = furnish(desks[i], m);
    if (!ok) return release(), false;
    most_tokens = all_tokens, most_items = all_items, pairs = all_pairs;
    return true;
  }

  // Room for what m tokens choose; of items as much more as a tile reads past the last.
  bool mixtures(int64_t m) {
    const int64_t choices = m * most_chosen;
    Mixture<A> &at = mixture;
    return !most_experts ||
           (take(at.logits, m * most_experts) && take(at.share, choices) &&
            take(at.expert, choices) && take(at.place, choices) &&
            take(at.first, most_experts + 1) && take(at.used, most_experts) &&
            take(at.token, choices) && take(at.weight, choices) && take(at.lone, choices) &&
            take(at.rows, (choices + TILE_ROWS) * model.hidden));
  }

  bool furnish(Desk<A> &desk, int64_t m) {
    const int64_t rows = padded(tile_tokens(group) * group, TILE_ROWS);
    const int64_t d = model.head_dim, ld = padded(d, TILE_COLUMNS);
    const int64_t floats = 2 * m * TILE_COLUMNS + rows * (KEY_BLOCK + ld + 2);
    const int64_t operands = rows * (d + KEY_BLOCK) + PANEL_LANES * TILE_COLUMNS * LANE<A> +
                             2 * KEY_BLOCK * d + (narrow() ? TILE_COLUMNS * widest : 0);
    const int64_t whole = narrow() ? Rounded::bytes(FEW_ROWS, widest) : 0;
    char *at = (char *)(desk.memory = allocate(4 * floats + sizeof(A) * operands + whole));
    if (!at) return false;
    auto floats_of = [&](int64_t n) { return (float *)(at += 4 * n, at - 4 * n); };
    desk.columns = floats_of(m * TILE_COLUMNS);
    desk.more = floats_of(m * TILE_COLUMNS);
    desk.tile.scores = floats_of(rows * KEY_BLOCK);
    desk.tile.to = {floats_of(rows), floats_of(rows), floats_of(rows * ld)};
    desk.tile.pack = (A *)at;
    desk.tile.q = desk.tile.pack + PANEL_LANES * TILE_COLUMNS * LANE<A>;
    desk.tile.weights = desk.tile.q + rows * d;
    desk.tile.keys = desk.tile.weights + rows * KEY_BLOCK;
    desk.tile.values = desk.tile.keys + KEY_BLOCK * d;
    desk.unpacked = desk.tile.values + KEY_BLOCK * d;
    desk.rounded = (char *)desk.unpacked + sizeof(A) * (narrow() ? TILE_COLUMNS * widest : 0);
    desk.rounded_at = NONE;
    return true;
  }

  // ---- products ----

  // c [m][columns] = a . weights, for columns from `first` on. `whole`: a in whole numbers, where the
  // product takes them. `lone` [m] says by which kernel a row goes, and so in which order it is summed:
  // unless `by_step`, that follows from how many tokens its own segment has, whoever shares the step.
  void product(Desk<A> &desk, const A *a, const uint8_t *lone, int64_t m, int64_t depth,
               const Matrix &weights, int64_t first, int64_t columns, float *c,
               const Rounded *whole = nullptr) {
    const bool packed = weights.format == WEIGHTS_INT4;
    if (packed && !(whole && all_lone(lone, m))) unpack_columns(desk, weights, depth, first, columns);
    for (int64_t r = 0, n; r < m; r += n) {
      for (n = 1; r + n < m && lone[r + n] == lone[r]; n++) {}
      const A *rows = a + r * depth;
      float *to = c + r * TILE_COLUMNS;
      if (weights.format == WEIGHTS_PLAIN)
        dense(desk, rows, lone[r], n, depth, (const T *)weights.at + first * depth, columns, to);
      else if (packed && whole && lone[r])
        packed_few(whole->from(r), n, packed_of(weights), first, columns, to, TILE_COLUMNS);
      else if (packed)
        dense(desk, rows, lone[r], n, depth, desk.unpacked, columns, to);
      else
        eight_bits(desk, rows, lone[r], n, depth, weights, first, columns, to,
                   whole ? whole->from(r) : Rounded{}, whole);
    }
  }

  void eight_bits(Desk<A> &desk, const A *a, bool lone, int64_t m, int64_t depth,
                  const Matrix &weights, int64_t first, int64_t columns, float *c,
                  const Rounded &rounded, bool whole) {
    const int8_t *w = (const int8_t *)weights.at + first * depth;
    if (!whole) dense(desk, a, lone, m, depth, w, columns, c);
    else if (lone) whole_few(rounded, m, w, columns, c, TILE_COLUMNS);
    else whole_many(rounded, m, w, columns, c, TILE_COLUMNS, (int8_t *)desk.tile.pack);
    const float *scale = (const float *)weights.scale + first;
    for (int64_t r = 0; r < m; r++)
      for (int64_t j = 0; j < columns; j++) c[r * TILE_COLUMNS + j] *= scale[j];
  }

  static Packed packed_of(const Matrix &weights) {
    return {(const uint8_t *)weights.at, (const bf16 *)weights.scale};
  }

  void unpack_columns(Desk<A> &desk, const Matrix &weights, int64_t depth, int64_t first,
                      int64_t columns) {
    const int64_t groups = padded(depth, BLOCK) / GROUP;
    for (int64_t j = 0; j < columns; j++)
      unpack(packed_of(weights), first + j, groups, 0, depth, desk.unpacked + j * depth);
  }

  static bool any_lone(const uint8_t *lone, int64_t m) { return m && memchr(lone, 1, m); }
  static bool all_lone(const uint8_t *lone, int64_t m) { return !m || !memchr(lone, 0, m); }

  // Whether some of m rows of activations are rounded to whole numbers for a product with weights:
  // where that is faster, and never in float32, which is exact.
  bool in_whole_numbers(const Matrix &weights, const uint8_t *lone, int64_t m) const {
    if (sizeof(T) != sizeof(bf16)) return false;
    return weights.format == WEIGHTS_INT8 || (weights.format == WEIGHTS_INT4 && any_lone(lone, m));
  }

  // m rows of a in whole numbers for a product with weights, null where it takes them as they are. A
  // few rows each thread rounds for itself, once a phase; many were rounded in the phase before.
  const Rounded *whole_numbers(Desk<A> &desk, const A *a, const uint8_t *lone, int64_t m,
                               int64_t depth, const Matrix &weights) {
    if (!in_whole_numbers(weights, lone, m)) return nullptr;
    if (m > FEW_ROWS) {
      desk.whole.lie_at(rounded, spare(m), depth);
      return &desk.whole;
    }
    const int64_t now = desk.walk->step * team.num_phases + desk.walk->phase;
    if (desk.rounded_at == now && desk.source == a) return &desk.whole;
    desk.whole.lie_at(desk.rounded, m, depth);
    for (int64_t r = 0; r < m; r++) desk.whole.round(r, a + r * depth);
    desk.rounded_at = now, desk.source = a;
    return &desk.whole;
  }

  int64_t round_tasks(const Matrix &weights, const uint8_t *lone, int64_t m) const {
    return m > FEW_ROWS && in_whole_numbers(weights, lone, m) ? row_tasks(m) : 0;
  }

  // The phase that rounds many rows for the product of the next one. Where they lie and how many they
  // are belongs to the step, and so is read with a task in hand.
  void round_rows(Walk &walk, A *const &a, const int64_t &rows, int64_t depth) {
    walk.share([&](int64_t task) {
      const int64_t m = rows;
      Rounded to;
      to.lie_at(rounded, spare(m), depth);
      each_row(task, m, [&](int64_t r) { to.round(r, a + r * depth); });
    });
  }

  template <class P>
  void dense(Desk<A> &desk, const A *a, bool lone, int64_t m, int64_t depth, const P *w,
             int64_t columns, float *c) {
    if (lone) few(a, m, depth, w, columns, c, TILE_COLUMNS);
    else many(a, m, depth, w, columns, c, TILE_COLUMNS, desk.tile.pack);
  }

  // part(first column, columns) for each block of the columns that a task stands for.
  template <class Part> static void blocks(int64_t task, const Split &split, Part part) {
    const int64_t stop = smaller(split.columns, (task + 1) * split.size);
    for (int64_t n = task * split.size; n < stop; n += TILE_COLUMNS)
      part(n, smaller(TILE_COLUMNS, stop - n));
  }

  // out(row, first column, columns, sums) for the columns of a . weights of one task.
  template <class Out>
  void linear(Desk<A> &desk, int64_t task, const A *a, const uint8_t *lone, int64_t m,
              int64_t depth, const Matrix &weights, const void *bias, const Split &split, Out out) {
    const Rounded *whole = whole_numbers(desk, a, lone, m, depth, weights);
    blocks(task, split, [&](int64_t first, int64_t count) {
      product(desk, a, lone, m, depth, weights, first, count, desk.columns, whole);
      for (int64_t r = 0; r < m; r++) {
        float *c = desk.columns + r * TILE_COLUMNS;
        if (bias)
          for (int64_t j = 0; j < count; j++) c[j] += widen(((const T *)bias)[first + j]);
        out(r, first, count, c);
      }
    });
  }

  // Add a sublayer's output to the residual, or put it aside to be normed by `post` first.
  void add_linear(Desk<A> &desk, int64_t task, const A *a, int64_t depth, const Matrix &weights,
                  const void *bias, const void *post) {
    const int64_t hidden = model.hidden;
    const float share = (float)model.residual_scale;
    linear(desk, task, a, lone, step.num_tokens, depth, weights, bias, by_hidden,
           [&](int64_t r, int64_t n, int64_t count, const float *c) {
             if (post) {
               memcpy(output + r * hidden + n, c, count * sizeof(float));
               return;
             }
             float *to = x + r * hidden + n;
             for (int64_t j = 0; j < count; j++) to[j] += share * c[j];
           });
  }

  // Of m rows [hidden] what the MLP of one expert, 0 where there is one alone, makes of them before
  // its last product: to [m][inner]. Experts take activations as they are.
  void gate_up(Desk<A> &desk, int64_t task, const Layer &layer, const Split &split, const A *rows,
               const uint8_t *lone, int64_t m, int64_t expert, A *to) {
    const int64_t n = layer.inner, gates = expert * 2 * n, ups = gates + n;
    const T *bias = (const T *)layer.gate_up_bias;
    const Rounded *whole =
        layer.experts ? nullptr : whole_numbers(desk, rows, lone, m, model.hidden, layer.gate_up);
    auto sums = [&](int64_t first, int64_t count, float *c) {
      product(desk, rows, lone, m, model.hidden, layer.gate_up, first, count, c, whole);
    };
    blocks(task, split, [&](int64_t first, int64_t count) {
      sums(gates + first, count, desk.columns);
      sums(ups + first, count, desk.more);
      for (int64_t r = 0; r < m; r++) {
        float *gate = desk.columns + r * TILE_COLUMNS, *up = desk.more + r * TILE_COLUMNS;
        for (int64_t j = 0; bias && j < count; j++) {
          gate[j] += widen(bias[gates + first + j]);
          up[j] += widen(bias[ups + first + j]);
        }
        activate(layer, gate, up, count, to + r * n + first);
      }
    });
  }

  static void activate(const Layer &layer, float *gate, float *up, int64_t count, A *to) {
    const int64_t kind = layer.activation;
    const float limit = (float)layer.mlp_limit, slope = (float)layer.activation_slope;
    for (int64_t j = 0; limit && j < count; j++) {
      gate[j] = gate[j] > limit ? limit : gate[j];
      up[j] = up[j] > limit ? limit : up[j] < -limit ? -limit : up[j];
    }
    for (int64_t j = 0; slope != 1 && j < count; j++) gate[j] *= slope;
    for (int64_t j = 0; j < count && kind; j++)
      gate[j] = kind == 1   ? gelu(gate[j])
                : kind == 2 ? gelu_tanh(gate[j])
                            : gate[j] > 0 ? gate[j] : 0;
    const vec share = vset(1 / slope), plus = vset((float)layer.up_plus_one);
    for (int64_t j = 0; j < count; j += W) {
      vec g = vload(gate + j);
      vstore(to + j, vmul(vmul(kind ? g : silu(g), share), vadd(vload(up + j), plus)));
    }
  }

  // ---- experts ----

  // How many experts a step's tokens can choose at most.
  int64_t slots(const Layer &layer) const {
    return smaller(layer.experts, step.num_tokens * layer.chosen);
  }

  // Which experts the rows of a task choose.
  void route(int64_t task, const Layer &layer) {
    const int64_t n = layer.experts, chosen = layer.chosen;
    const T *bias = (const T *)layer.router_bias;
    each_row(task, step.num_tokens, [&](int64_t m) {
      float *logits = mixture.logits + m * n;
      few(normed + m * model.hidden, 1, model.hidden, (const T *)layer.router, n, logits, n);
      for (int64_t e = 0; bias && e < n; e++) logits[e] += widen(bias[e]);
      choose(logits, n, chosen, layer.normalised, mixture.expert + m * chosen,
             mixture.share + m * chosen);
    });
  }

  // Tasks are each expert's columns; those of experts that nobody chose are of nothing.
  void expert_gate_up(Desk<A> &desk, int64_t task, const Layer &layer, const Split &split) {
    const int64_t slot = task / split.tasks();
    if (slot >= mixture.num_used) return;
    const int64_t e = mixture.used[slot], first = mixture.first[e];
    gate_up(desk, task % split.tasks(), layer, split, mixture.rows + first * model.hidden,
            mixture.lone + first, mixture.first[e + 1] - first, e, inner + first * layer.inner);
  }

  // Add what the experts make of their items to some columns, expert after expert: so nobody else
  // writes there, and sums have one order.
  void add_experts(Desk<A> &desk, int64_t task, const Layer &layer) {
    const int64_t hidden = model.hidden, n = layer.inner;
    const bool aside = layer.mlp_post_norm;
    const float share = aside ? 1 : (float)model.residual_scale;
    float *sums = aside ? output : x;
    blocks(task, by_hidden, [&](int64_t column, int64_t count) {
      for (int64_t m = 0; aside && m < step.num_tokens; m++)
        memset(sums + m * hidden + column, 0, count * sizeof(float));
      for (int64_t u = 0; u < mixture.num_used; u++) {
        const int64_t e = mixture.used[u], first = mixture.first[e], row = e * hidden + column;
        const T *bias = layer.down_bias ? (const T *)layer.down_bias + row : nullptr;
        product(desk, inner + first * n, mixture.lone + first, mixture.first[e + 1] - first, n,
                layer.down, row, count, desk.columns);
        for (int64_t i = first; i < mixture.first[e + 1]; i++) {
          const float *c = desk.columns + (i - first) * TILE_COLUMNS;
          float *to = sums + mixture.token[i] * hidden + column;
          const float weight = share * mixture.weight[i];
          for (int64_t j = 0; j < count; j++) to[j] += weight * (c[j] + (bias ? widen(bias[j]) : 0));
        }
      }
    });
  }

  // ---- rows ----

  static Norm norm_of(const Layer &layer, const void *weight, const void *bias = nullptr) {
    return {weight, bias, (float)layer.norm_eps, (float)layer.plus_one, layer.centred != 0};
  }

  static Moments moments(const float *from, int64_t n, Norm norm) {
    vec total = vzero(), sum = vzero();
    for (int64_t i = 0; norm.centred && i < n; i += W) total = vadd(vload(from + i), total);
    const float mean = norm.centred ? vsum(total) / n : 0;
    for (int64_t i = 0; i < n; i += W) {
      const vec x = vsub(vload(from + i), vset(mean));
      sum = vfma(x, x, sum);
    }
    return {mean, 1 / sqrtf(vsum(sum) / n + norm.eps)};
  }

  // n of the numbers that these moments are of, by as many weights; `from` and `to` may be the same.
  template <class P>
  static void apply(Norm norm, Moments by, const float *from, int64_t n, P *to) {
    const vec root = vset(by.root), mean = vset(by.mean), plus = vset(norm.plus);
    for (int64_t i = 0; i < n; i += W) {
      const vec weight = vadd(vload((const T *)norm.weight + i), plus);
      vec out = vmul(vmul(vsub(vload(from + i), mean), root), weight);
      if (norm.bias) out = vadd(out, vload((const T *)norm.bias + i));
      vstore(to + i, out);
    }
  }

  template <class P> static void normalise(const float *from, int64_t n, Norm norm, P *to) {
    if (norm.weight) return apply(norm, moments(from, n, norm), from, n, to);
    for (int64_t i = 0; i < n; i += W) vstore(to + i, vload(from + i));
  }

  // Norm the output of a sublayer that stands aside and add it to the residual, where it does.
  void settle(int64_t m, Norm post) {
    if (!post.weight) return;
    const int64_t n = model.hidden;
    float *to = x + m * n, *from = output + m * n;
    normalise(from, n, post, from);
    const vec share = vset((float)model.residual_scale);
    for (int64_t i = 0; i < n; i += W)
      vstore(to + i, vfma(vload(from + i), share, vload(to + i)));
  }

  // The norm, if any, that the output of the MLP before layer l is still owed.
  Norm owed_before(int64_t l) const {
    if (!l) return Norm{};
    const Layer &before = model.layers[l - 1];
    return norm_of(before, before.mlp_post_norm, before.mlp_post_norm_bias);
  }

  int64_t row_tasks(int64_t rows) const {
    return rows <= FEW_ROWS ? rows : (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  }

  // part(row) for each row that a task stands for.
  template <class Part> void each_row(int64_t task, int64_t rows, Part part) const {
    const int64_t size = rows <= FEW_ROWS ? 1 : BLOCK_ROWS;
    for (int64_t m = task * size; m < smaller(rows, (task + 1) * size); m++) part(m);
  }

  void norm(int64_t task, Norm post, Norm norm) {
    const int64_t n = model.hidden;
    each_row(task, step.num_tokens, [&](int64_t m) {
      settle(m, post);
      normalise(x + m * n, n, norm, normed + m * n);
    });
  }

  void embed(int64_t m) {
    const int64_t n = model.hidden, half = model.head_dim / 2;
    const int64_t token = step.tokens[m], row = token * n;
    const bool plain = model.embed.format == WEIGHTS_PLAIN;
    const float scale = (plain ? 1 : ((const float *)model.embed.scale)[token]) * (float)model.embedding_scale;
    for (int64_t i = row; i < row + n; i += W) {
      const vec stored =
          plain ? vload((const T *)model.embed.at + i) : vload((const int8_t *)model.embed.at + i);
      vstore(x + m * n + i - row, vmul(stored, vset(scale)));
    }
    const float *frequencies = step.segments[segment[m]].frequencies;
    for (int64_t t = 0; t < model.num_ropes; t++)
      for (int64_t i = 0; i < half; i++) {
        const double angle = (float)position[m] * frequencies[t * half + i];
        const float factor = (float)model.rope_scalings[t * half + i];
        const int64_t at = turn(m, t) + i;
        cosines[at] = (float)cos(angle) * factor;
        sines[at] = (float)sin(angle) * factor;
      }
  }

  // Where the cosines and sines of a token by a rotary table begin.
  int64_t turn(int64_t m, int64_t table) const {
    return (m * model.num_ropes + table) * (model.head_dim / 2);
  }

  // A head's row [D], normed where the layer does, rotated where it does, scaled. `all`: of all
  // heads together, where these are normed so.
  template <class P>
  void rotate(const Layer &layer, const float *from, Norm norm, Moments all, int64_t m, float scale,
              P *to) {
    const int64_t d = model.head_dim, half = d / 2;
    float normal[MOST_HEAD_DIM];
    if (norm.weight) {
      apply(norm, layer.wide_qk_norm ? all : moments(from, d, norm), from, d, normal);
      from = normal;
    }
    if (layer.rope < 0) {
      for (int64_t i = 0; i < d; i += W) vstore(to + i, vmul(vload(from + i), vset(scale)));
      return;
    }
    const float *c = cosines + turn(m, layer.rope), *s = sines + turn(m, layer.rope);
    for (int64_t i = 0; i < half; i += W) {
      if (half - i < W) return rotate_rest(from, i, c, s, scale, to);
      vec low = vload(from + i), high = vload(from + half + i);
      vec cosine = vmul(vload(c + i), vset(scale)), sine = vmul(vload(s + i), vset(scale));
      vstore(to + i, vsub(vmul(low, cosine), vmul(high, sine)));
      vstore(to + half + i, vfma(high, cosine, vmul(low, sine)));
    }
  }

  // Where half a head is no whole vector.
  template <class P>
  void rotate_rest(const float *from, int64_t i, const float *c, const float *s, float scale, P *to) {
    const int64_t half = model.head_dim / 2;
    float rest[2 * W] = {0};
    alignas(64) P narrow[2 * W];
    for (int64_t j = i; j < half; j++) {
      rest[j - i] = (from[j] * c[j] - from[half + j] * s[j]) * scale;
      rest[W + j - i] = (from[half + j] * c[j] + from[j] * s[j]) * scale;
    }
    vstore(narrow, vload(rest));
    vstore(narrow + W, vload(rest + W));
    for (int64_t j = i; j < half; j++) to[j] = narrow[j - i], to[half + j] = narrow[W + j - i];
  }

  static const Cache &cache_of(const Segment &s, int64_t layer, int64_t head) {
    const Cache *cache = s.caches + s.first_cache[layer];
    while (head >= cache->first + cache->heads) cache++;
    return *cache;
  }

  // The norm of a query or key head: across all heads each has its own part of the weight.
  Norm head_norm(const Layer &layer, const void *weight, int64_t head) const {
    const int64_t own = layer.wide_qk_norm ? head * model.head_dim : 0;
    return norm_of(layer, weight ? (const T *)weight + own : nullptr);
  }

  // The logits beside the scores of a KV head's queries in powers of two, put into `to` [group]; null
  // where there are none.
  const float *sinks_of(int64_t layer, int64_t head, float *to) const {
    const T *logits = (const T *)model.layers[layer].sink_logits;
    for (int64_t g = 0; logits && g < group; g++) to[g] = LOG2_E * widen(logits[head * group + g]);
    return logits ? to : nullptr;
  }

  // What attention's scores in powers of two are capped by, 0 for nothing.
  float cap_of(int64_t layer) const { return LOG2_E * (float)model.layers[layer].logit_cap; }

  Form form_of(const Cache &cache) const { return {cache.format, model.head_dim, sizeof(T)}; }

  // The keys, or the values, of a step's tokens from `first` on and of one head.
  Tokens fresh(T *base, const Form &form, int64_t first, int64_t head) const {
    const int64_t kv = model.kv_heads, d = model.head_dim;
    return form.rows(base + (first * kv + head) * d, kv * d * sizeof(T));
  }

  // Queries, key and value of one token and KV head; a row's single token goes straight into its
  // cache.
  void project(int64_t index, const Layer &layer, int64_t m, int64_t head) {
    const int64_t d = model.head_dim, kv = model.kv_heads;
    const float scale = LOG2_E * (float)layer.query_scale;  // softmax in powers of two
    const float *from = qkv + m * width;
    const bool wide = layer.q_norm && layer.wide_qk_norm;
    const Norm norm = norm_of(layer, nullptr);
    const Moments all_q = wide ? moments(from, queries, norm) : Moments{};
    const Moments all_k = wide ? moments(from + queries, kv * d, norm) : Moments{};
    const Segment &s = step.segments[segment[m]];
    const Cache &cache = cache_of(s, index, head);
    const Form form = form_of(cache);
    for (int64_t g = head * group; g < (head + 1) * group; g++)
      ask(layer, form, from + g * d, head_norm(layer, layer.q_norm, g), all_q, m, scale,
          q + m * queries + g * d);
    Tokens key = fresh(k, form, m, head), value = fresh(v, form, m, head);
    if (s.count == 1) {
      const int64_t slot = slot_of(cache, s.start - cache.shift);
      key = slots_of(cache, form, cache.keys, head).skip(slot);
      value = slots_of(cache, form, cache.values, head).skip(slot);
    }
    hold(form, key, [&](T *to) {
      rotate(layer, from + queries + head * d, head_norm(layer, layer.k_norm, head), all_k, m, 1.0f, to);
    });
    hold(form, value, [&](T *to) {
      for (int64_t i = 0; i < d; i += W)
        vstore(to + i, vload(from + queries + (kv + head) * d + i));
    });
  }

  // A query [D] as `rotate` leaves it, rotated once more where the head's keys are.
  void ask(const Layer &layer, const Form &form, const float *from, Norm norm, Moments all, int64_t m,
           float scale, A *to) {
    if (!form.rotated()) return rotate(layer, from, norm, all, m, scale, to);
    float turned[MOST_HEAD_DIM];
    rotate(layer, from, norm, all, m, scale, turned);
    hadamard(turned, model.head_dim);
    for (int64_t i = 0; i < model.head_dim; i += W) vstore(to + i, vload(turned + i));
  }

  // Put what make(to [D]) makes where a token of a head is held, rounded where it is.
  template <class Make> static void hold(const Form &form, Tokens to, Make make) {
    if (form.plain()) return make((T *)to.numbers);
    T exact[MOST_HEAD_DIM];
    make(exact);
    write_token(form, exact, to);
  }

  // What attention gives a query head, [D] times `share`, rotated back where the values were.
  void hand_over(const Form &form, const float *from, float share, A *to) const {
    const int64_t d = model.head_dim;
    float out[MOST_HEAD_DIM];
    for (int64_t i = 0; i < d; i += W) vstore(out + i, vmul(vload(from + i), vset(share)));
    if (form.rotated()) hadamard(out, d);
    for (int64_t i = 0; i < d; i += W) vstore(to + i, vload(out + i));
  }

  // ---- attention ----

  Runs decode_runs(int64_t layer, const Segment &s, int64_t head) const {
    Runs runs;
    const Cache &cache = cache_of(s, layer, head);
    add_held(runs, cache, form_of(cache), head, s.start + 1);
    runs.clip(s.start, s.start);
    return runs;
  }

  // How many tasks a layer's attention is. One token reads all that its row holds in pieces short
  // enough to balance and long enough to pay, cut as if the row were alone.
  int64_t attention_tasks(int64_t layer) {
    int64_t tasks = 0;
    const int64_t tile = tile_tokens(group);
    for (int64_t i = 0; i < step.num_segments; i++) {
      const Segment &s = step.segments[i];
      if (s.count > 1) {
        tasks += model.kv_heads * ((s.count + tile - 1) / tile);
        continue;
      }
      int64_t sum = 0;
      for (int64_t head = 0; head < model.kv_heads; head++) sum += decode_runs(layer, s, head).tokens();
      const int64_t even = padded(sum / (4 * team.threads), DECODE_BLOCK);
      const int64_t size = piece_of(layer, i) = larger(DECODE_BLOCK, smaller(512, even));
      for (int64_t head = 0; head < model.kv_heads; head++)
        tasks += (decode_runs(layer, s, head).tokens() + size - 1) / size;
    }
    return tasks;
  }

  int64_t &piece_of(int64_t layer, int64_t index) const {
    return piece[layer * step.num_segments + index];
  }

  void attend(Walk &walk, Desk<A> &desk, int64_t layer) {
    int64_t mine = walk.claim();
    if (mine != NONE) attend_from(walk, desk, layer, mine);
    walk.next();
  }

  // Tasks are counted off in the order of attention_tasks, from the first claimed one on.
  void attend_from(Walk &walk, Desk<A> &desk, int64_t layer, int64_t mine) {
    const int64_t tile = tile_tokens(group), kv = model.kv_heads;
    int64_t task = 0, item = 0, first = 0;
    auto ours = [&] { return task++ == mine; };
    auto on = [&] {
      walk.finish();
      return mine = walk.claim();
    };
    for (int64_t i = 0;; i++) {
      const Segment &s = step.segments[i];
      for (int64_t head = 0; head < kv; head++) {
        if (s.count == 1) {
          const Runs runs = decode_runs(layer, s, head);
          const int64_t size = piece_of(layer, i), pieces = (runs.tokens() + size - 1) / size;
          for (int64_t p = 0; p < pieces; p++)
            if (ours()) {
              decode_item(desk, runs, layer, form_of(cache_of(s, layer, head)), i * kv + head, first,
                          head, item, p, pieces, size);
              if (on() == NONE) return;
            }
          item += pieces;
        } else {
          // the last tiles see most and go first
          for (int64_t t = (s.count - 1) / tile * tile; t >= 0; t -= tile)
            if (ours()) {
              prefill_tile(desk, layer, s, first, head, t, smaller(tile, s.count - t));
              if (on() == NONE) return;
            }
        }
      }
      first += s.count;
    }
  }

  Partial partial_of(int64_t item) const {
    float *at = partial + item * group * (model.head_dim + 2);
    return {at, at + group, at + 2 * group};
  }

  // The tokens from p * size on of all that one query token sees; the last to end adds them up.
  void decode_item(Desk<A> &desk, const Runs &runs, int64_t layer, const Form &form, int64_t pair,
                   int64_t m, int64_t head, int64_t item, int64_t p, int64_t pieces, int64_t size) {
    const int64_t d = model.head_dim;
    const Partial to = partial_of(item + p);
    float logits[MOST_GROUP];
    const float *sinks = p ? nullptr : sinks_of(layer, head, logits);  // they count once
    for (int64_t g = 0; g < group; g++)
      to.peak[g] = sinks ? sinks[g] : HIDDEN, to.sum[g] = sinks ? 1 : 0;
    memset(to.out, 0, group * d * sizeof(float));
    const Attention attention = {form, q + m * queries + head * group * d, to, cap_of(layer)};
    attend_tokens(desk, attention, runs, p * size, size);
    if (__atomic_add_fetch(&done[pair], 1, __ATOMIC_ACQ_REL) < pieces) return;
    done[pair] = 0;
    for (int64_t g = 0; g < group; g++)
      combine(form, item, pieces, g, attended + m * queries + (head * group + g) * d);
  }

  // One token's queries [group][D] of a KV head, and where what they see is added up.
  struct Attention {
    const Form &form;
    const A *q;
    Partial to;
    float cap;
  };

  // Up to `left` tokens after the first `skip` of what one query token sees.
  void attend_tokens(Desk<A> &desk, const Attention &at, const Runs &runs, int64_t skip, int64_t left) {
    constexpr bool whole = sizeof(T) == sizeof(bf16);  // float32 is exact
    Asked asked;
    if (whole && !at.form.plain()) asked.take(at.q, group, model.head_dim);
    for (int i = 0; i < runs.count && left; i++) {
      const int64_t n = smaller(runs.run[i].count - skip, left);
      if (n > 0) {
        const Run part = runs.run[i].part(skip, n);
        if (whole && !at.form.plain()) attend_whole(asked, at, part);
        else attend_exact(desk, at, part);
        left -= n;
      }
      skip = larger(0, skip - runs.run[i].count);
    }
  }

  void attend_whole(const Asked &asked, const Attention &at, const Run &run) const {
    const int64_t d = model.head_dim;
    if (at.form.format == CACHE_INT8)
      attend_codes<int8_t>(asked, group, d, run.keys, run.values, run.count, at.to, at.cap);
    else attend_codes<Nibbles>(asked, group, d, run.keys, run.values, run.count, at.to, at.cap);
  }

  void attend_exact(Desk<A> &desk, const Attention &at, const Run &run) const {
    each_block<T>(desk.tile, at.form, run, [&](const auto &block, const Run &part) {
      attend_one(at.q, group, model.head_dim, block.keys, block.values, block.stride, part.count, at.to,
                 at.cap);
    });
  }

  void combine(const Form &form, int64_t item, int64_t pieces, int64_t g, A *to) {
    const int64_t d = model.head_dim;
    const Partial all = partial_of(item);
    for (int64_t p = 1; p < pieces; p++) {
      const Partial part = partial_of(item + p);
      const float peak = all.peak[g] > part.peak[g] ? all.peak[g] : part.peak[g];
      const float old = power2(all.peak[g] - peak), fresh = power2(part.peak[g] - peak);
      for (int64_t i = g * d; i < (g + 1) * d; i += W)
        vstore(all.out + i, vfma(vload(part.out + i), vset(fresh), vmul(vload(all.out + i), vset(old))));
      all.sum[g] = all.sum[g] * old + part.sum[g] * fresh;
      all.peak[g] = peak;
    }
    hand_over(form, all.out + g * d, 1 / all.sum[g], to);
  }

  // Queries t to t + tokens - 1 of a segment that stands at `first` among the step's tokens.
  void prefill_tile(Desk<A> &desk, int64_t layer, const Segment &s, int64_t first, int64_t head,
                    int64_t t, int64_t tokens) {
    const int64_t d = model.head_dim, ld = padded(d, TILE_COLUMNS);
    const Cache &cache = cache_of(s, layer, head);
    const Form form = form_of(cache);
    Runs runs;
    add_held(runs, cache, form, head, s.start);
    add_positions(runs, cache, fresh(k, form, first, head), fresh(v, form, first, head), s.start,
                  s.count);
    runs.clip(s.start + t, s.start + t + tokens - 1);
    for (int64_t i = 0; i < tokens; i++)
      memcpy(desk.tile.q + i * group * d, q + (first + t + i) * queries + head * group * d,
             group * d * sizeof(A));
    float logits[MOST_GROUP];
    attend_tile<T>(desk.tile, form, tokens, group, s.start + t, ld, runs, cap_of(layer),
                   sinks_of(layer, head, logits));
    for (int64_t i = 0; i < tokens; i++)
      for (int64_t g = 0; g < group; g++) {
        const int64_t row = i * group + g;
        hand_over(form, desk.tile.to.out + row * ld, 1 / desk.tile.to.sum[row],
                  attended + (first + t + i) * queries + (head * group + g) * d);
      }
  }

  // Put what a segment leaves into the caches, once nobody reads them any more.
  void store(int64_t layer, const Segment &s, int64_t head) {
    if (s.count == 1) return;
    int64_t first = 0;
    for (const Segment *before = step.segments; before < &s; before++) first += before->count;
    const Cache &cache = cache_of(s, layer, head);
    const Form form = form_of(cache);
    const Tokens keys = slots_of(cache, form, cache.keys, head);
    const Tokens values = slots_of(cache, form, cache.values, head);
    const Tokens new_keys = fresh(k, form, first, head), new_values = fresh(v, form, first, head);
    const int64_t begin = s.start - cache.shift, end = begin + s.count;
    for (int64_t place = begin; place < end; place++) {
      if (place >= cache.sink) place = larger(place, end - (cache.size - cache.sink));
      const int64_t slot = slot_of(cache, place);
      form.copy(keys.skip(slot), new_keys.skip(place - begin));
      form.copy(values.skip(slot), new_values.skip(place - begin));
    }
  }

  // ---- the step ----

  int64_t store_tasks() const { return step.num_segments * model.kv_heads; }

  // How many tasks each phase of run() has.
  void plan() {
    const int64_t m = step.num_tokens;
    int64_t p = 0;
    team.prepare(p++, row_tasks(m));
    for (int64_t l = 0; l < model.num_layers; l++) {
      const Layer &layer = model.layers[l];
      team.prepare(p++, row_tasks(m));
      team.prepare(p++, round_tasks(layer.qkv, lone, m));
      team.prepare(p++, by_width.tasks());
      team.prepare(p++, row_tasks(m) * model.kv_heads);
      team.prepare(p++, attention_tasks(l));
      team.prepare(p++, round_tasks(layer.o, lone, m));
      team.prepare(p++, store_tasks() + by_hidden.tasks());
      team.prepare(p++, row_tasks(m));
      if (layer.experts) {
        team.prepare(p++, 1);
        team.prepare(p++, row_tasks(m));
        team.prepare(p++, slots(layer) * by_inner[l].tasks());
      } else {
        team.prepare(p++, round_tasks(layer.gate_up, lone, m));
        team.prepare(p++, by_inner[l].tasks());
        team.prepare(p++, round_tasks(layer.down, lone, m));
      }
      team.prepare(p++, by_hidden.tasks());
    }
    team.prepare(p++, larger(1, step.num_wanted));
    team.prepare(p++, round_tasks(model.head, wanted_lone, step.num_wanted));
    team.prepare(p++, step.num_wanted ? by_vocab.tasks() : 1);
  }

  void run(int64_t index, uint64_t number) {
    Desk<A> &desk = desks[index];
    Walk walk{team, number};
    desk.walk = &walk;
    walk.share([&](int64_t task) {
      each_row(task, step.num_tokens, [&](int64_t m) { embed(m); });
    });
    for (int64_t l = 0; l < model.num_layers; l++) run_layer(walk, desk, l);
    walk.share([&](int64_t i) {
      if (i >= step.num_wanted) return;
      const Norm last = {model.norm, model.norm_bias, (float)model.norm_eps, (float)model.plus_one,
                         model.centred != 0};
      settle(step.wanted[i], owed_before(model.num_layers));
      normalise(x + step.wanted[i] * model.hidden, model.hidden, last, normed + i * model.hidden);
    });
    round_rows(walk, normed, step.num_wanted, model.hidden);
    walk.share([&](int64_t task) {
      linear(desk, task, normed, wanted_lone, step.num_wanted, model.hidden, model.head, nullptr,
             by_vocab,
             [&](int64_t r, int64_t first, int64_t count, float *c) {
               finish_logits(c, count);
               memcpy(step.logits + step.places[r] * model.vocab + first, c, count * sizeof(float));
             });
    });
  }

  void finish_logits(float *c, int64_t count) const {
    const float scale = (float)model.logit_scale, cap = (float)model.logit_cap;
    for (int64_t j = 0; scale != 1 && j < count; j++) c[j] *= scale;
    for (int64_t j = 0; cap && j < count; j++) c[j] = cap * tanhf(c[j] / cap);
  }

  void run_layer(Walk &walk, Desk<A> &desk, int64_t l) {
    const Layer &layer = model.layers[l];
    walk.share([&](int64_t task) {
      norm(task, owed_before(l), norm_of(layer, layer.attn_norm, layer.attn_norm_bias));
    });
    round_rows(walk, normed, step.num_tokens, model.hidden);
    walk.share([&](int64_t task) {
      linear(desk, task, normed, lone, step.num_tokens, model.hidden, layer.qkv, layer.qkv_bias,
             by_width,
             [&](int64_t r, int64_t n, int64_t count, const float *c) {
               memcpy(qkv + r * width + n, c, count * sizeof(float));
             });
    });
    walk.share([&](int64_t task) {
      const int64_t kv = model.kv_heads;
      each_row(task / kv, step.num_tokens,
               [&](int64_t m) { project(l, layer, m, task % kv); });
    });
    attend(walk, desk, l);
    round_rows(walk, attended, step.num_tokens, queries);
    walk.share([&](int64_t task) {
      const int64_t stores = store_tasks(), kv = model.kv_heads;
      if (task < stores) store(l, step.segments[task / kv], task % kv);
      else add_linear(desk, task - stores, attended, queries, layer.o, layer.o_bias,
                      layer.attn_post_norm);
    });
    walk.share([&](int64_t task) {
      const Norm post = norm_of(layer, layer.attn_post_norm, layer.attn_post_norm_bias);
      // in parallel the MLP takes what attention took
      if (layer.parallel) each_row(task, step.num_tokens, [&](int64_t m) { settle(m, post); });
      else norm(task, post, norm_of(layer, layer.mlp_norm, layer.mlp_norm_bias));
      if (layer.experts) route(task, layer);
    });
    if (layer.experts) return run_experts(walk, desk, l);
    round_rows(walk, normed, step.num_tokens, model.hidden);
    walk.share([&](int64_t task) {
      gate_up(desk, task, layer, by_inner[l], normed, lone, step.num_tokens, 0, inner);
    });
    round_rows(walk, inner, step.num_tokens, layer.inner);
    walk.share([&](int64_t task) {
      add_linear(desk, task, inner, layer.inner, layer.down, layer.down_bias,
                 layer.mlp_post_norm);
    });
  }

  // The MLPs of a layer whose rows have chosen theirs.
  void run_experts(Walk &walk, Desk<A> &desk, int64_t l) {
    const Layer &layer = model.layers[l];
    walk.share([&](int64_t) { mixture.group(step.num_tokens, layer.experts, layer.chosen); });
    walk.share([&](int64_t task) {
      each_row(task, step.num_tokens, [&](int64_t m) {
        mixture.hand_over(m, layer.chosen, normed + m * model.hidden, model.hidden, lone[m]);
      });
    });
    walk.share([&](int64_t task) { expert_gate_up(desk, task, layer, by_inner[l]); });
    walk.share([&](int64_t task) { add_experts(desk, task, layer); });
  }

  bool take_step(const Step &asked) {
    int64_t kv_tokens = 0;
    for (int64_t l = 0; l < model.num_layers; l++) {
      int64_t held = 0;
      for (int64_t i = 0; i < asked.num_segments; i++) {
        const Segment &s = asked.segments[i];
        const Cache *end = s.caches + s.first_cache[l + 1];
        for (const Cache *c = s.caches + s.first_cache[l]; c < end; c++) held += c->heads * c->size;
      }
      kv_tokens = larger(kv_tokens, held);
    }
    if (!reserve(asked.num_tokens, asked.num_segments, kv_tokens)) return false;
    int64_t m = 0;
    for (int64_t i = 0; i < asked.num_segments; i++)
      for (int64_t t = 0; t < asked.segments[i].count; t++, m++)
        segment[m] = i, position[m] = asked.segments[i].start + t,
        lone[m] = (by_step() ? asked.num_tokens : asked.segments[i].count) <= FEW_ROWS;
    for (int64_t i = 0, n; i < asked.num_wanted; i += n) {  // those of a segment stand together
      for (n = 1; i + n < asked.num_wanted && segment[asked.wanted[i + n]] == segment[asked.wanted[i]]; n++) {}
      memset(wanted_lone + i, (by_step() ? asked.num_wanted : n) <= FEW_ROWS, n);
    }
    step = asked;
    plan();
    team.begin();
    run(0, team.step);
    return true;
  }

  void serve(int64_t index) {
    for (uint64_t seen = 0; (seen = team.follow(seen)) != CLOSED;) run(index, seen);
  }

  void close() { team.close(); }
};

struct Handle {
  bool bf16;
  void *engine;
};

#define EXPORT extern "C" __attribute__((visibility("default")))
#define WITH(handle, call) \
  (handle->bf16 ? ((Engine<bf16> *)handle->engine)->call : ((Engine<float> *)handle->engine)->call)

EXPORT int64_t moac_abi() { return MOAC_ABI; }

template <class T> static void *open_engine(const Model *model, int64_t threads) {
  void *memory = aligned_alloc(64, padded(sizeof(Engine<T>), 64));
  if (!memory) return nullptr;
  Engine<T> *engine = new (memory) Engine<T>(*model, threads);
  if (engine->whole()) return engine;
  engine->~Engine();
  free(memory);
  return nullptr;
}

static bool known(const Matrix &weights) {
  return weights.format >= WEIGHTS_PLAIN && weights.format <= WEIGHTS_INT4;
}

static bool known_formats(const Model &model) {
  bool all = known(model.embed) && model.embed.format != WEIGHTS_INT4 && known(model.head);
  for (int64_t l = 0; l < model.num_layers; l++) {
    const Layer &layer = model.layers[l];
    all = all && known(layer.qkv) && known(layer.o) && known(layer.gate_up) && known(layer.down);
  }
  return all;
}

// A Status; `opened` is the engine where it is DONE.
EXPORT int64_t moac_open(const Model *model, int64_t threads, Handle **opened) {
  if (!known_formats(*model)) return UNKNOWN_FORMAT;
  Handle *handle = (Handle *)malloc(sizeof(Handle));
  if (!handle) return SHORT_OF_MEMORY;
  handle->bf16 = model->bf16;
  handle->engine = model->bf16 ? open_engine<bf16>(model, threads) : open_engine<float>(model, threads);
  if (!handle->engine) return free(handle), SHORT_OF_MEMORY;
  *opened = handle;
  return DONE;
}

// A Status: whether steps can be taken over such caches. To be asked once, before the first.
EXPORT int64_t moac_serves(const Cache *caches, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (caches[i].format < CACHE_PLAIN || caches[i].format > CACHE_INT4) return UNKNOWN_FORMAT;
  return DONE;
}

// Threads 1 to threads - 1 spend their life in here, until moac_close sends them home.
EXPORT void moac_serve(Handle *handle, int64_t index) { WITH(handle, serve(index)); }

// A Status; nothing is written to the caches where it is not DONE.
EXPORT int64_t moac_step(Handle *handle, const Step *step) {
  return WITH(handle, take_step(*step)) ? DONE : SHORT_OF_MEMORY;
}

EXPORT void moac_close(Handle *handle) { WITH(handle, close()); }

template <class T> static void destroy(void *engine) {
  ((Engine<T> *)engine)->~Engine();
  free(engine);
}

// Only once the threads have come back.
EXPORT void moac_free(Handle *handle) {
  if (handle->bf16) destroy<bf16>(handle->engine);
  else destroy<float>(handle->engine);
  free(handle);
}

// `count` elements of 0 float32, 1 bfloat16, 2 float16 to bfloat16 or float32. No multiple of
// anything is asked for.
EXPORT void moac_convert(const void *from, int64_t kind, void *to, int64_t to_bf16, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float value = kind == 0   ? ((const float *)from)[i]
                        : kind == 1 ? widen(((const bf16 *)from)[i])
                                    : from_half(((const uint16_t *)from)[i]);
    if (to_bf16) {
      bf16 narrow[W];
      vstore(narrow, vset(value));
      ((bf16 *)to)[i] = narrow[0];
    } else {
      ((float *)to)[i] = value;
    }
  }
}
