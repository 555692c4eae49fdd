// Products of rows with weights laid out in panels, by the CPU's dot products of the few numbers that
// fill a word: y = f(x W^T). The file that includes this says which numbers, and what f is.
//
// A panel holds 2 W output columns, a word of inputs at a time, so that a tile of a few rows and one
// panel keeps its sums in registers. While tiles pass over a panel the next one is fetched, little
// by little: reading weights and computing go on together. Every sum runs over the inputs in their
// order, whatever the tile: a row's numbers do not depend on the rows beside it.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int64_t COLUMNS = 2 * W;   // of a panel
constexpr int64_t TALL = 12;         // rows whose sums fit in 32 registers
constexpr int64_t CACHED = 1 << 18;  // bytes of x that stay in a core's cache while panels pass

// What to fetch while one of `tiles` tiles passes over a panel: its share of the next panel.
struct Ahead {
  const uint32_t* next;
  int64_t done, lines;  // lines of memory already asked for; of a step, in parts of 2^16

  Ahead(const uint32_t* next, int64_t words, int64_t tile, int64_t tiles)
      : next(next), done(2 * words * tile / tiles), lines((2 << 16) / tiles) {}

  template <bool LONE>
  void fetch(int64_t step) const {
    const uint32_t* line = next + (done + (step * lines >> 16)) * W;
    __builtin_prefetch(line, 0, 2);
    if (LONE) __builtin_prefetch(line + W, 0, 2);
  }
};

// A place in each of R rows. Every third row's is a register, from which the two after it are found:
// the compiler would take one for each, and with not enough of them move them to and fro.
template <class X, int R>
struct Cursors {
  static constexpr int BASES = (R + 2) / 3;
  const X* bases[BASES];
  int64_t stride;

  Cursors(const X* first, int64_t stride) : stride(stride) {
#pragma GCC unroll 4
    for (int i = 0; i < BASES; i++) bases[i] = first + 3 * i * stride;
  }

  const X* operator[](int row) const { return bases[row / 3] + row % 3 * stride; }

  void advance() {
#pragma GCC unroll 4
    for (int i = 0; i < BASES; i++) {
      bases[i] += 4 / sizeof(X);
      asm("" : "+r"(bases[i]));  // so that the compiler cannot know how they hang together
    }
    asm("" : "+r"(stride));
  }
};

// X is the type of the numbers in x and in the panels, Sum the vector that they are summed in.
// Result has dot(sums, words of a panel, word of x) -> sums, at(column, left) -> what it needs of
// the next vector of columns, of which `left` are there, and put(row, column, left, sums, these);
// MORE is how many words of its own lie behind the others of a panel.
template <class X, class Sum, class Result>
struct Dots {
  static constexpr int64_t PER = 4 / sizeof(X);  // numbers in a word

  const X* x;
  const uint32_t* weight;
  Result result;
  int64_t x_stride, rows, inputs, outputs;

  int64_t words() const { return (inputs + PER - 1) / PER; }
  int64_t size() const { return words() * COLUMNS + Result::MORE; }
  int64_t panels() const { return (outputs + COLUMNS - 1) / COLUMNS; }

  // The first n of the numbers of a word, as they lie; the others are zero.
  static uint32_t word(const X* from, int64_t n) {
    uint32_t all = 0;
    std::memcpy(&all, from, n < PER ? n * sizeof(X) : sizeof all);
    return all;
  }

  template <int R, int P>
  inline void multiply(const Cursors<X, R>& from, const uint32_t* at, int64_t n,
                       Sum (*acc)[2 * P]) const {
    vu columns[2 * P];
#pragma GCC unroll 8
    for (int c = 0; c < 2 * P; c++)
      std::memcpy(columns + c, at + c / 2 * size() + c % 2 * W, sizeof(vu));
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      uint32_t all = word(from[r], n);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * P; c++) acc[r][c] = Result::dot(acc[r][c], columns[c], all);
    }
  }

  // Rows `row` to `row + R`, panels `panel` to `panel + P`: tile `number` of their `tiles`.
  template <int R, int P>
  void tile(int64_t row, int64_t panel, int64_t number, int64_t tiles) const {
    const uint32_t* w = weight + panel * size();
    Cursors<X, R> from(x + row * x_stride, x_stride);
    Ahead ahead(w + P * size(), P * words(), number, tiles);
    Sum acc[R][2 * P] = {};
    for (int64_t k = 0; k < inputs / PER; k++) {
      tiles == 1 ? ahead.fetch<true>(P * k) : ahead.fetch<false>(k);
      multiply<R, P>(from, w + k * COLUMNS, PER, acc);
      from.advance();
    }
    if (inputs % PER) multiply<R, P>(from, w + inputs / PER * COLUMNS, inputs % PER, acc);
    // Unrolled like the loops above: sums that are found by a variable would not stay in registers.
#pragma GCC unroll 8
    for (int c = 0; c < 2 * P; c++) {
      int64_t at = panel * COLUMNS + c * W, left = outputs - at;
      auto needed = result.at(at, left);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        if (left > 0) result.put(row + r, at, left, acc[r][c], needed);
    }
  }

  // Rows `row` to `stop` of one panel, in tiles of nearly equal height.
  void column(int64_t row, int64_t stop, int64_t panel) const {
    int64_t tiles = (stop - row + TALL - 1) / TALL;
    for (int64_t i = 0; i < tiles; i++) {
      int64_t height = (stop - row + tiles - i - 1) / (tiles - i);
      switch (height) {
        case 1: tile<1, 1>(row, panel, i, tiles); break;
        case 2: tile<2, 1>(row, panel, i, tiles); break;
        case 3: tile<3, 1>(row, panel, i, tiles); break;
        case 4: tile<4, 1>(row, panel, i, tiles); break;
        case 5: tile<5, 1>(row, panel, i, tiles); break;
        case 6: tile<6, 1>(row, panel, i, tiles); break;
        case 7: tile<7, 1>(row, panel, i, tiles); break;
        case 8: tile<8, 1>(row, panel, i, tiles); break;
        case 9: tile<9, 1>(row, panel, i, tiles); break;
        case 10: tile<10, 1>(row, panel, i, tiles); break;
        case 11: tile<11, 1>(row, panel, i, tiles); break;
        case 12: tile<12, 1>(row, panel, i, tiles); break;
      }
      row += height;
    }
  }

  // Several panels under one or two rows: more sums are under way at once.
  template <int R, int P>
  void few_rows() const {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels(); panel += P) {
      if (panel + P <= panels()) {
        tile<R, P>(0, panel, 0, 1);
      } else {
        for (int64_t p = panel; p < panels(); p++) tile<R, 1>(0, p, 0, 1);
      }
    }
  }

  // Called by all threads of a team.
  void run() const {
    if (rows == 1) return few_rows<1, 4>();
    if (rows == 2) return few_rows<2, 2>();
    int64_t fit = CACHED / (int64_t)sizeof(X) / inputs;
    int64_t most = std::max<int64_t>(fit, TALL) / TALL * TALL;
    int64_t blocks = (rows + most - 1) / most;
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t panel = 0; panel < panels(); panel++)
        column(b * rows / blocks, (b + 1) * rows / blocks, panel);
  }
};

}  // namespace
