// Products with float32 weights laid out in panels: y = x W^T + b.
//
// A panel holds 2 W output columns, input by input, so that a tile of a few rows and one panel
// keeps its sums in registers and reads the weights as one stream. Where every weight is a bfloat16
// number the panel keeps 16 bits of each: columns j and W + j share a word, and widening is a shift
// and a mask, both exact. Every sum runs over the inputs in their order, whatever the tile: a row's
// numbers do not depend on the rows beside it.

#include <algorithm>

#include "vectors.h"
#include "words.h"

namespace {

constexpr int64_t COLUMNS = 2 * W;   // of a panel
constexpr int64_t TALL = 6;          // rows whose sums fit in 16 registers
constexpr int64_t CACHED = 1 << 16;  // numbers of x that stay in a core's cache while panels pass
constexpr int64_t AHEAD = 1024;      // bytes by which weights are fetched ahead for few rows

struct Halves {
  static constexpr int64_t step = W;  // floats' worth of memory for one input
  static void read(const float* p, vf* columns) {
    vu pair = (vu)load(p);
    columns[0] = (vf)(pair << 16);
    columns[1] = (vf)(pair & 0xffff0000u);
  }
};

struct Floats {
  static constexpr int64_t step = 2 * W;
  static void read(const float* p, vf* columns) {
    columns[0] = load(p);
    columns[1] = load(p + W);
  }
};

struct Product {
  const float *x, *weight, *bias;
  float* y;
  int64_t x_stride, y_stride, rows, inputs, outputs;

  // Rows `row` to `row + R`, panels `panel` to `panel + P`.
  template <class Weights, int R, int P>
  void tile(int64_t row, int64_t panel) const {
    const int64_t size = inputs * Weights::step;
    const float *from = x + row * x_stride, *w = weight + panel * size;
    vf acc[R][2 * P] = {};
    for (int64_t k = 0; k < inputs; k++) {
      vf columns[2 * P];
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) {
        const float* at = w + p * size + k * Weights::step;
        if (R < 5) __builtin_prefetch((const char*)at + AHEAD);
        Weights::read(at, columns + 2 * p);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * P; c++) acc[r][c] += from[r * x_stride + k] * columns[c];
    }
    for (int c = 0; c < 2 * P; c++) {
      int64_t at = panel * COLUMNS + c * W, left = outputs - at;
      if (left <= 0) return;
      vf base = bias ? load(bias + at, left) : vf{};
      for (int r = 0; r < R; r++) store(y + (row + r) * y_stride + at, acc[r][c] + base, left);
    }
  }

  // Rows `row` to `stop` of one panel, in tiles of nearly equal height.
  template <class Weights>
  void column(int64_t row, int64_t stop, int64_t panel) const {
    for (int64_t tiles = (stop - row + TALL - 1) / TALL; tiles; tiles--) {
      int64_t height = (stop - row + tiles - 1) / tiles;
      switch (height) {
        case 1: tile<Weights, 1, 1>(row, panel); break;
        case 2: tile<Weights, 2, 1>(row, panel); break;
        case 3: tile<Weights, 3, 1>(row, panel); break;
        case 4: tile<Weights, 4, 1>(row, panel); break;
        case 5: tile<Weights, 5, 1>(row, panel); break;
        case 6: tile<Weights, 6, 1>(row, panel); break;
      }
      row += height;
    }
  }

  // Four panels under one row: four times as many sums are under way at once.
  template <class Weights>
  void lone_row(int64_t threads) const {
    int64_t panels = (outputs + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel += 4) {
      if (panel + 4 <= panels) {
        tile<Weights, 1, 4>(0, panel);
      } else {
        for (int64_t p = panel; p < panels; p++) tile<Weights, 1, 1>(0, p);
      }
    }
  }

  template <class Weights>
  void run(int64_t threads) const {
    if (rows == 1) return lone_row<Weights>(threads);
    int64_t panels = (outputs + COLUMNS - 1) / COLUMNS;
    int64_t most = std::max<int64_t>(CACHED / inputs, TALL) / TALL * TALL;
    int64_t blocks = (rows + most - 1) / most;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t panel = 0; panel < panels; panel++)
        column<Weights>(b * rows / blocks, (b + 1) * rows / blocks, panel);
  }
};

void product_of_floats(const float* x, int64_t x_stride, const float* panels, const float* bias,
                       float* y, int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs,
                       int64_t threads) {
  Product{x, panels, bias, y, x_stride, y_stride, rows, inputs, outputs}.run<Floats>(threads);
}

void product_of_halves(const float* x, int64_t x_stride, const float* panels, const float* bias,
                       float* y, int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs,
                       int64_t threads) {
  Product{x, panels, bias, y, x_stride, y_stride, rows, inputs, outputs}.run<Halves>(threads);
}

// The weights of some output columns, as they were.
template <class Weights>
void rows(const float* panels, const int64_t* columns, float* to, int64_t count, int64_t inputs,
          int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const float* panel = panels + columns[i] / COLUMNS * inputs * Weights::step;
    int64_t column = columns[i] % COLUMNS;
    for (int64_t k = 0; k < inputs; k++) {
      vf both[2];
      Weights::read(panel + k * Weights::step, both);
      to[i * inputs + k] = both[column / W][column % W];
    }
  }
}

void rows_of_floats(const float* panels, const int64_t* columns, float* to, int64_t count,
                    int64_t inputs, int64_t threads) {
  rows<Floats>(panels, columns, to, count, inputs, threads);
}

void rows_of_halves(const float* panels, const int64_t* columns, float* to, int64_t count,
                    int64_t inputs, int64_t threads) {
  rows<Halves>(panels, columns, to, count, inputs, threads);
}

}  // namespace

CALLED(product_of_floats)
CALLED(product_of_halves)
CALLED(rows_of_floats)
CALLED(rows_of_halves)

extern "C" {

// Floats' worth of memory for the panels of a weight [outputs, inputs].
int64_t panels_size(int64_t outputs, int64_t inputs, int64_t halves) {
  return (outputs + COLUMNS - 1) / COLUMNS * inputs * (halves ? Halves::step : Floats::step);
}

// Lay a weight out into `panels`, which hold zeros; those that it does not fill stay.
void lay_out(const float* weight, int64_t stride, int64_t step, int64_t outputs, int64_t inputs,
             int64_t halves, float* panels, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t panel = 0; panel < (outputs + COLUMNS - 1) / COLUMNS; panel++)
    for (int64_t i = 0; i < std::min(COLUMNS, outputs - panel * COLUMNS) * inputs; i++) {
      int64_t column = i / inputs, k = i % inputs;
      float value = weight[(panel * COLUMNS + column) * stride + k * step];
      if (!halves) {
        panels[(panel * inputs + k) * COLUMNS + column] = value;
        continue;
      }
      uint32_t bits, word;
      float* place = panels + (panel * inputs + k) * W + column % W;
      std::memcpy(&bits, &value, sizeof bits);
      std::memcpy(&word, place, sizeof word);
      word |= column < W ? bits >> 16 : bits & 0xffff0000u;
      std::memcpy(place, &word, sizeof word);
    }
}

}  // extern "C"
