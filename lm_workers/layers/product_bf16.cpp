// Products with bfloat16 weights laid out in panels: y = x W^T + b, by the CPU's dot products of
// pairs of bfloat16 numbers (AVX-512 BF16), which are summed in float32.
//
// A panel holds 2 W output columns, two inputs at a time, so that a tile of a few rows and one
// panel keeps its sums in registers. While tiles pass over a panel the next one is fetched, little
// by little: reading weights and computing go on together. Every sum runs over the inputs in their
// order, whatever the tile: a row's numbers do not depend on the rows beside it.

#include <algorithm>

#include "pairs.h"

#ifndef __AVX512BF16__
#error "this CPU has no dot products of bfloat16 numbers (AVX-512 BF16)"
#endif

namespace {

constexpr int64_t COLUMNS = 2 * W;   // of a panel
constexpr int64_t TALL = 12;         // rows whose sums fit in 32 registers
constexpr int64_t CACHED = 1 << 17;  // numbers of x that stay in a core's cache while panels pass

// The first n, 1 or 2, of two numbers as they lie; the other is zero.
inline uint32_t pair(const T* x, int64_t n) {
  uint32_t both = 0;
  std::memcpy(&both, x, n < 2 ? sizeof(T) : sizeof both);
  return both;
}

// What to fetch while one of `tiles` tiles passes over a panel: its share of the next panel.
struct Ahead {
  const uint32_t* next;
  int64_t done, lines;  // lines of memory already asked for; of a step, in parts of 2^16

  Ahead(const uint32_t* next, int64_t pairs, int64_t tile, int64_t tiles)
      : next(next), done(2 * pairs * tile / tiles), lines((2 << 16) / tiles) {}

  template <bool LONE>
  void fetch(int64_t step) const {
    const uint32_t* line = next + (done + (step * lines >> 16)) * W;
    __builtin_prefetch(line, 0, 2);
    if (LONE) __builtin_prefetch(line + W, 0, 2);
  }
};

// A place in each of R rows. Every third row's is a register, from which the two after it are found:
// the compiler would take one for each, and with not enough of them move them to and fro.
template <int R>
struct Cursors {
  static constexpr int BASES = (R + 2) / 3;
  const T* bases[BASES];
  int64_t stride;

  Cursors(const T* first, int64_t stride) : stride(stride) {
#pragma GCC unroll 4
    for (int i = 0; i < BASES; i++) bases[i] = first + 3 * i * stride;
  }

  const T* operator[](int row) const { return bases[row / 3] + row % 3 * stride; }

  void advance() {
#pragma GCC unroll 4
    for (int i = 0; i < BASES; i++) {
      bases[i] += 2;
      asm("" : "+r"(bases[i]));  // so that the compiler cannot know how they hang together
    }
    asm("" : "+r"(stride));
  }
};

struct Product {
  const T* x;
  const uint32_t* weight;
  const T* bias;
  T* y;
  int64_t x_stride, y_stride, rows, inputs, outputs;

  int64_t pairs() const { return (inputs + 1) / 2; }
  int64_t panels() const { return (outputs + COLUMNS - 1) / COLUMNS; }

  template <int R, int P>
  inline void multiply(const Cursors<R>& from, const uint32_t* at, int64_t size, int64_t n,
                       vf (*acc)[2 * P]) const {
    vu columns[2 * P];
#pragma GCC unroll 8
    for (int c = 0; c < 2 * P; c++)
      std::memcpy(columns + c, at + c / 2 * size + c % 2 * W, sizeof(vu));
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      uint32_t both = pair(from[r], n);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * P; c++) acc[r][c] = dot(acc[r][c], columns[c], both);
    }
  }

  // Rows `row` to `row + R`, panels `panel` to `panel + P`: tile `number` of their `tiles`.
  template <int R, int P>
  void tile(int64_t row, int64_t panel, int64_t number, int64_t tiles) const {
    const int64_t size = pairs() * COLUMNS;
    const uint32_t* w = weight + panel * size;
    Cursors<R> from(x + row * x_stride, x_stride);
    Ahead ahead(w + P * size, P * pairs(), number, tiles);
    vf acc[R][2 * P] = {};
    for (int64_t k = 0; k < inputs / 2; k++) {
      tiles == 1 ? ahead.fetch<true>(P * k) : ahead.fetch<false>(k);
      multiply<R, P>(from, w + k * COLUMNS, size, 2, acc);
      from.advance();
    }
    if (inputs % 2) multiply<R, P>(from, w + inputs / 2 * COLUMNS, size, 1, acc);
    // Unrolled like the loops above: sums that are found by a variable would not stay in registers.
#pragma GCC unroll 8
    for (int c = 0; c < 2 * P; c++) {
      int64_t at = panel * COLUMNS + c * W, left = outputs - at;
      vf base = bias && left > 0 ? load(bias + at, left) : vf{};
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        if (left > 0) store(y + (row + r) * y_stride + at, acc[r][c] + base, left);
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
  void few_rows(int64_t threads) const {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels(); panel += P) {
      if (panel + P <= panels()) {
        tile<R, P>(0, panel, 0, 1);
      } else {
        for (int64_t p = panel; p < panels(); p++) tile<R, 1>(0, p, 0, 1);
      }
    }
  }

  void run(int64_t threads) const {
    if (rows == 1) return few_rows<1, 4>(threads);
    if (rows == 2) return few_rows<2, 2>(threads);
    int64_t most = std::max<int64_t>(CACHED / inputs, TALL) / TALL * TALL;
    int64_t blocks = (rows + most - 1) / most;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t panel = 0; panel < panels(); panel++)
        column(b * rows / blocks, (b + 1) * rows / blocks, panel);
  }
};

void product(const T* x, int64_t x_stride, const uint32_t* panels, const T* bias, T* y,
             int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
  Product{x, panels, bias, y, x_stride, y_stride, rows, inputs, outputs}.run(threads);
}

int64_t place(int64_t column, int64_t k, int64_t inputs) {
  int64_t pair = column / COLUMNS * ((inputs + 1) / 2) + k / 2;
  return 2 * (pair * COLUMNS + column % COLUMNS) + k % 2;
}

}  // namespace

CALLED(product)

extern "C" {

// Words of memory for the panels of a weight [outputs, inputs].
int64_t panels_size(int64_t outputs, int64_t inputs) {
  return (outputs + COLUMNS - 1) / COLUMNS * COLUMNS * ((inputs + 1) / 2);
}

}  // extern "C"
