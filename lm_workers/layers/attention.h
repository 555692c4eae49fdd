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

// Scores of R rows against KEYS keys, then their weights, with the maximum seen so far.
template <int R>
inline void score(Scratch& s, int64_t row, int64_t position, float scale) {
  vf acc[R][KEYS / W] = {};
  const T* q = &s.query[row * s.width];
  for (int64_t d = 0; d < s.width; d += PACK) {
    vf key[KEYS / W];
#pragma GCC unroll 2
    for (int64_t v = 0; v < KEYS / W; v++) key[v] = load(&s.keys[d / PACK * KEYS + v * W]);
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int64_t v = 0; v < KEYS / W; v++)
        acc[r][v] = dot(acc[r][v], key[v], q + r * s.width + d);
  }
  vi place;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) place[i] = i;
  for (int64_t r = 0; r < R; r++) {
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

// Add the values of KEYS tokens to R rows, by their weights. `value(k, d)` is W numbers of one.
template <int R, class Value>
inline void accumulate(Scratch& s, int64_t row, Value value) {
  for (int64_t d = 0; d < s.width; d += W) {
    vf acc[R];
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; r++) acc[r] = load(&s.out[(row + r) * s.width + d]);
    for (int64_t k = 0; k < KEYS; k++) {
      vf one = value(k, d);
#pragma GCC unroll 4
      for (int64_t r = 0; r < R; r++) acc[r] += s.weights[(row + r) * KEYS + k] * one;
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; r++) store(&s.out[(row + r) * s.width + d], acc[r]);
  }
}

struct Attention {
  const T *query, *keys, *values;
  T* out;
  const int64_t* table;  // blocks of the tile's sequence
  int64_t stride, heads, kv_heads, size, block, window;
  float scale;

  // The tokens from `position` on; past `end`, zeros.
  void locate(const Scratch& s, int64_t position, int64_t end, Places& to) const {
    const int64_t* from = table + position / block;
    for (int64_t k = 0, place = position % block; k < KEYS; k++) {
      bool there = position + k < end;
      int64_t at = there ? (*from * block + place) * kv_heads * size : 0;
      to.keys[k] = there ? keys + at : s.zeros.data();
      to.values[k] = there ? values + at : s.zeros.data();
      if (++place == block) place = 0, from++;
    }
  }

  // Read one head of KEYS keys, and ask the memory for the same of the next ones: little by little,
  // or it would have to be waited for until it takes so many requests. The same for values; those
  // of the first keys, which none before them asked for, are asked for with these.
  void fetch_keys(Scratch& s, int64_t head, const Places& from, const Places& next,
                  bool first) const {
    for (int64_t group = 0; group < KEYS; group += W)
      for (int64_t d = 0; d < size; d += LANES) {
        vf square[W];
        for (int64_t k = 0; k < W; k++) {
          square[k] = packed(from.keys[group + k] + head * size + d, size - d);
          __builtin_prefetch(next.keys[group + k] + head * size + d, 0, 2);
          if (first) __builtin_prefetch(from.values[group + k] + head * size + d, 0, 2);
        }
        transpose(square);
        for (int64_t k = 0; k < W; k++) store(&s.keys[(d / PACK + k) * KEYS + group], square[k]);
      }
  }

  vf value(int64_t head, const Places& from, const Places& next, int64_t k, int64_t d) const {
    if (d % LINE == 0) __builtin_prefetch(next.values[k] + head * size + d, 0, 2);
    return load(from.values[k] + head * size + d, std::max<int64_t>(0, size - d));
  }

  void fetch_values(Scratch& s, int64_t head, const Places& from, const Places& next) const {
    for (int64_t k = 0; k < KEYS; k++)
      for (int64_t d = 0; d < size; d += W)
        store(&s.values[k * s.width + d], value(head, from, next, k, d));
  }

  // Weigh KEYS tokens for up to R rows of one head. Values were fetched, or are read as they lie.
  template <int R = ROWS>
  void weigh(Scratch& s, int64_t row, int64_t count, int64_t at, bool fetched, int64_t head,
             const Places& from, const Places& next) const {
    if constexpr (R > 1)
      if (count < R) return weigh<R - 1>(s, row, count, at, fetched, head, from, next);
    score<R>(s, row, at, scale);
    if (fetched)
      accumulate<R>(s, row, [&](int64_t k, int64_t d) { return load(&s.values[k * s.width + d]); });
    else
      accumulate<R>(s, row, [&](int64_t k, int64_t d) { return value(head, from, next, k, d); });
  }

  // Tokens `first` to `first + count` of the step, the first of them at `position`, under `share`
  // KV heads from `head` on.
  void tile(Scratch& s, int64_t head, int64_t share, int64_t first, int64_t count,
            int64_t position) const {
    int64_t group = heads / kv_heads, rows = count * group, end = position + count;
    bool fetched = rows > ROWS;  // by fewer rows they are read only once
    int64_t at = (window ? std::max<int64_t>(0, position + 1 - window) : 0) / KEYS * KEYS;
    Places now, next;
    locate(s, at, end, now);
    for (int64_t h = 0; h < share; h++)
      for (int64_t r = 0; r < rows; r++) {
        int64_t row = h * rows + r;
        const T* q =
            query + (first + r / group) * stride + ((head + h) * group + r % group) * size;
        T* kept = &s.query[row * s.width];
        std::fill(std::copy(q, q + size, kept), kept + s.width, T{});
        std::fill(&s.out[row * s.width], &s.out[row * s.width] + s.width, 0.f);
        s.best[row] = NONE;
        s.total[row] = 0.f;
        s.end[row] = position + r / group + 1;
        s.first[row] = window ? std::max<int64_t>(0, s.end[row] - window) : 0;
      }
    for (bool first = true; at < end; at += KEYS, first = false) {
      locate(s, std::min(at + KEYS, end), end, next);
      for (int64_t h = 0; h < share; h++) {
        fetch_keys(s, head + h, now, next, first);
        if (fetched) fetch_values(s, head + h, now, next);
        for (int64_t r = 0; r < rows; r += ROWS)
          weigh(s, h * rows + r, rows - r, at, fetched, head + h, now, next);
      }
      now = next;
    }
    for (int64_t h = 0; h < share; h++)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < size; d += W) {
          int64_t row = h * rows + r, to = (head + h) * group + r % group;
          vf mean = load(&s.out[row * s.width + d]) / s.total[row];
          store(out + ((first + r / group) * heads + to) * size + d, mean, size - d);
        }
  }
};

}  // namespace
