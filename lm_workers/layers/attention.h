// Attention of a tile of query rows over paged keys and values.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t KEYS = 2 * W;  // keys that one round looks at, at fixed positions of the sequence
constexpr int64_t TILE = 16;     // tokens that share one pass over the keys
constexpr int64_t LINE = 64 / sizeof(T);  // numbers that the memory delivers together
constexpr float NONE = -std::numeric_limits<float>::infinity();

// Where the keys and values of KEYS tokens begin, all heads of a token one after the other.
struct Places {
  const T *keys[KEYS], *values[KEYS];
};

// What one thread of `attend` works with. Rows are the query heads of a tile's tokens.
struct Scratch {
  int64_t width, rows;  // head size and row count, rounded up to whole vectors and register tiles
  std::vector<float> keys, values, out, weights, best, total;
  std::vector<int64_t> first, end;
  std::vector<T> query, zeros;

  Scratch(int64_t size, int64_t kv_heads, int64_t rows)
      : width((size + LANES - 1) / LANES * LANES), rows(rows), keys(width / PACK * KEYS),
        values(KEYS * width), out(rows * width), weights(rows * KEYS), best(rows), total(rows),
        first(rows), end(rows), query(rows * width), zeros(kv_heads * size) {}
};

// One round of a transposition: lanes whose numbers differ in the bit STEP change places.
template <int STEP>
inline void exchange(vf* r) {
  vi low, high;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    low[i] = i & STEP ? W + (i ^ STEP) : i;
    high[i] = i & STEP ? W + i : i ^ STEP;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & STEP)) {
      vf a = r[i], b = r[i + STEP];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + STEP] = __builtin_shuffle(a, b, high);
    }
}

inline void transpose(vf* r) {
  exchange<1>(r);
  exchange<2>(r);
  if constexpr (W > 4) exchange<4>(r);
  if constexpr (W > 8) exchange<8>(r);
}

// Scores of 4 rows against KEYS keys, then their weights, with the maximum seen so far.
inline void score(Scratch& s, int64_t row, int64_t position, float scale) {
  vf acc[ROWS][KEYS / W] = {};
  const T* q = &s.query[row * s.width];
  for (int64_t d = 0; d < s.width; d += PACK) {
    vf key[KEYS / W];
#pragma GCC unroll 2
    for (int64_t v = 0; v < KEYS / W; v++) key[v] = load(&s.keys[d / PACK * KEYS + v * W]);
#pragma GCC unroll 4
    for (int64_t r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int64_t v = 0; v < KEYS / W; v++)
        acc[r][v] = dot(acc[r][v], key[v], q + r * s.width + d);
  }
  vi place;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) place[i] = i;
  for (int64_t r = 0; r < ROWS; r++) {
    vi first = vi{} + (int32_t)(s.first[row + r] - position);
    vi end = vi{} + (int32_t)(s.end[row + r] - position);
    vf top = splat(s.best[row + r]);
    for (int64_t v = 0; v < KEYS / W; v++) {
      vi at = place + (int32_t)(v * W);
      acc[r][v] = (at >= first) & (at < end) ? acc[r][v] * scale : splat(NONE);
      top = larger(top, acc[r][v]);
    }
    float best = largest(top), before = s.best[row + r];
    float fade = before == best ? 1.f : exponential(splat(before - best))[0];
    if (before == NONE) fade = 0.f;
    vf total{};
    for (int64_t v = 0; v < KEYS / W; v++) {
      vf weight = acc[r][v] == NONE ? vf{} : exponential(acc[r][v] - best);
      store(&s.weights[(row + r) * KEYS + v * W], weight);
      total += weight;
    }
    s.best[row + r] = best;
    s.total[row + r] = s.total[row + r] * fade + sum(total);
    if (fade != 1.f)
      for (int64_t d = 0; d < s.width; d += W) {
        float* o = &s.out[(row + r) * s.width + d];
        store(o, load(o) * fade);
      }
  }
}

inline void accumulate(Scratch& s, int64_t row) {
  for (int64_t d = 0; d < s.width; d += W) {
    vf acc[ROWS];
    for (int64_t r = 0; r < ROWS; r++) acc[r] = load(&s.out[(row + r) * s.width + d]);
    for (int64_t k = 0; k < KEYS; k++) {
      vf value = load(&s.values[k * s.width + d]);
      for (int64_t r = 0; r < ROWS; r++) acc[r] += s.weights[(row + r) * KEYS + k] * value;
    }
    for (int64_t r = 0; r < ROWS; r++) store(&s.out[(row + r) * s.width + d], acc[r]);
  }
}

struct Attention {
  const T *query, *keys, *values;
  T* out;
  const int64_t* table;  // blocks of the tile's sequence
  int64_t stride, heads, kv_heads, size, block, window;
  float scale;

  // The tokens from `position` on; past `end`, zeros. Asks the memory for those of `share` heads.
  void locate(const Scratch& s, int64_t head, int64_t share, int64_t position, int64_t end,
              Places& to) const {
    const int64_t* from = table + position / block;
    for (int64_t k = 0, place = position % block; k < KEYS; k++) {
      bool there = position + k < end;
      int64_t at = there ? (*from * block + place) * kv_heads * size : 0;
      to.keys[k] = there ? keys + at : s.zeros.data();
      to.values[k] = there ? values + at : s.zeros.data();
      for (int64_t d = head * size; there && d < (head + share) * size; d += LINE) {
        __builtin_prefetch(to.keys[k] + d, 0, 2);
        __builtin_prefetch(to.values[k] + d, 0, 2);
      }
      if (++place == block) place = 0, from++;
    }
  }

  // Read one head of KEYS keys and values.
  void fetch(Scratch& s, int64_t head, const Places& from) const {
    int64_t first = head * size;
    for (int64_t group = 0; group < KEYS; group += W)
      for (int64_t d = 0; d < size; d += LANES) {
        vf square[W];
        for (int64_t k = 0; k < W; k++)
          square[k] = packed(from.keys[group + k] + first + d, size - d);
        transpose(square);
        for (int64_t k = 0; k < W; k++) store(&s.keys[(d / PACK + k) * KEYS + group], square[k]);
      }
    for (int64_t k = 0; k < KEYS; k++)
      for (int64_t d = 0; d < size; d += W)
        store(&s.values[k * s.width + d], load(from.values[k] + first + d, size - d));
  }

  // Tokens `first` to `first + count` of the step, the first of them at `position`, under `share`
  // KV heads from `head` on.
  void tile(Scratch& s, int64_t head, int64_t share, int64_t first, int64_t count,
            int64_t position) const {
    int64_t group = heads / kv_heads, rows = count * group, end = position + count;
    int64_t padded = (rows + ROWS - 1) / ROWS * ROWS;
    int64_t at = (window ? std::max<int64_t>(0, position + 1 - window) : 0) / KEYS * KEYS;
    Places now, next;
    locate(s, head, share, at, end, now);
    for (int64_t h = 0; h < share; h++)
      for (int64_t r = 0; r < padded; r++) {
        bool real = r < rows;
        int64_t row = h * padded + r;
        const T* q =
            query + (first + r / group) * stride + ((head + h) * group + r % group) * size;
        T* kept = &s.query[row * s.width];
        std::fill(kept, kept + s.width, T{});
        if (real) std::copy(q, q + size, kept);
        std::fill(&s.out[row * s.width], &s.out[row * s.width] + s.width, 0.f);
        s.best[row] = NONE;
        s.total[row] = 0.f;
        s.end[row] = real ? position + r / group + 1 : 0;
        s.first[row] = window ? std::max<int64_t>(0, s.end[row] - window) : 0;
      }
    for (; at < end; at += KEYS) {
      if (at + KEYS < end) locate(s, head, share, at + KEYS, end, next);
      for (int64_t h = 0; h < share; h++) {
        fetch(s, head + h, now);
        for (int64_t r = h * padded; r < (h + 1) * padded; r += ROWS) {
          score(s, r, at, scale);
          accumulate(s, r);
        }
      }
      now = next;
    }
    for (int64_t h = 0; h < share; h++)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < size; d += W) {
          int64_t row = h * padded + r, to = (head + h) * group + r % group;
          vf mean = load(&s.out[row * s.width + d]) / s.total[row];
          store(out + ((first + r / group) * heads + to) * size + d, mean, size - d);
        }
  }
};

}  // namespace
