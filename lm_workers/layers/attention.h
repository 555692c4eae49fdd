// Attention of a tile of query rows over paged keys and values.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t KEYS = 2 * W;  // keys that one round looks at, at fixed positions of the sequence
constexpr int64_t TILE = 16;     // tokens that share one pass over the keys
constexpr float NONE = -std::numeric_limits<float>::infinity();

// What one thread of `attend` works with. Rows are the query heads of a tile's tokens.
struct Scratch {
  int64_t width, rows;  // head size and row count, rounded up to whole vectors and register tiles
  std::vector<float> query, keys, values, out, weights, best, total;
  std::vector<int64_t> first, end;

  Scratch(int64_t width, int64_t rows)
      : width(width), rows(rows), query(rows * width), keys(width * KEYS), values(KEYS * width),
        out(rows * width), weights(rows * KEYS), best(rows), total(rows), first(rows), end(rows) {}
};

inline void transpose(vf* r) {
  for (int step = 1; step < W; step *= 2) {
    vi low, high;
    for (int i = 0; i < W; i++) {
      low[i] = i & step ? W + (i ^ step) : i;
      high[i] = i & step ? W + i : i ^ step;
    }
    for (int i = 0; i < W; i++)
      if (!(i & step)) {
        vf a = r[i], b = r[i + step];
        r[i] = __builtin_shuffle(a, b, low);
        r[i + step] = __builtin_shuffle(a, b, high);
      }
  }
}

// Scores of 4 rows against KEYS keys, then their weights, with the maximum seen so far.
inline void score(Scratch& s, int64_t row, int64_t position) {
  vf acc[ROWS][KEYS / W] = {};
  const float* q = &s.query[row * s.width];
  for (int64_t d = 0; d < s.width; d++)
    for (int64_t v = 0; v < KEYS / W; v++) {
      vf key = load(&s.keys[d * KEYS + v * W]);
      for (int64_t r = 0; r < ROWS; r++) acc[r][v] += q[r * s.width + d] * key;
    }
  vi place;
  for (int i = 0; i < W; i++) place[i] = i;
  for (int64_t r = 0; r < ROWS; r++) {
    vi first = vi{} + (int32_t)(s.first[row + r] - position);
    vi end = vi{} + (int32_t)(s.end[row + r] - position);
    vf top = splat(s.best[row + r]);
    for (int64_t v = 0; v < KEYS / W; v++) {
      vi at = place + (int32_t)(v * W);
      acc[r][v] = (at >= first) & (at < end) ? acc[r][v] : splat(NONE);
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

  // Read KEYS keys and values from `position` on; past `end` they are zero.
  void fetch(Scratch& s, int64_t head, int64_t position, int64_t end) const {
    for (int64_t group = 0; group < KEYS; group += W)
      for (int64_t d = 0; d < s.width; d += W) {
        vf square[W];
        for (int64_t k = 0; k < W; k++) {
          int64_t at = position + group + k;
          vf value{};
          square[k] = vf{};
          if (at < end) {
            int64_t from = ((table[at / block] * block + at % block) * kv_heads + head) * size + d;
            square[k] = load(keys + from, size - d);
            value = load(values + from, size - d);
          }
          store(&s.values[(group + k) * s.width + d], value);
        }
        transpose(square);
        for (int64_t k = 0; k < W; k++) store(&s.keys[(d + k) * KEYS + group], square[k]);
      }
  }

  // Tokens `first` to `first + count` of the step, the first of them at `position`.
  void tile(Scratch& s, int64_t head, int64_t first, int64_t count, int64_t position) const {
    int64_t group = heads / kv_heads, rows = count * group;
    int64_t padded = (rows + ROWS - 1) / ROWS * ROWS;
    for (int64_t r = 0; r < padded; r++) {
      bool real = r < rows;
      const T* q = query + (first + r / group) * stride + (head * group + r % group) * size;
      for (int64_t d = 0; d < s.width; d += W) {
        store(&s.query[r * s.width + d], real ? load(q + d, size - d) * scale : vf{});
        store(&s.out[r * s.width + d], vf{});
      }
      s.best[r] = NONE;
      s.total[r] = 0.f;
      s.end[r] = real ? position + r / group + 1 : 0;
      s.first[r] = window ? std::max<int64_t>(0, s.end[r] - window) : 0;
    }
    int64_t end = position + count;
    for (int64_t at = s.first[0] / KEYS * KEYS; at < end; at += KEYS) {
      fetch(s, head, at, end);
      for (int64_t r = 0; r < padded; r += ROWS) {
        score(s, r, at);
        accumulate(s, r);
      }
    }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < size; d += W) {
        T* o = out + ((first + r / group) * heads + head * group + r % group) * size + d;
        store(o, load(&s.out[r * s.width + d]) / s.total[r], size - d);
      }
  }
};

}  // namespace
