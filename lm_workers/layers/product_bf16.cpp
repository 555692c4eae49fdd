// Products with bfloat16 weights laid out in panels: y = x W^T + b, by the CPU's dot products of
// pairs of bfloat16 numbers (AVX-512 BF16), which are summed in float32.

#include "dots.h"
#include "pairs.h"

#ifndef __AVX512BF16__
#error "this CPU has no dot products of bfloat16 numbers (AVX-512 BF16)"
#endif

namespace {

struct Biased {
  static constexpr int64_t MORE = 0;
  const T* bias;
  T* y;
  int64_t y_stride;

  static vf dot(vf sums, vu pairs, uint32_t two) { return ::dot(sums, pairs, two); }

  vf at(int64_t column, int64_t left) const {
    return bias && left > 0 ? load(bias + column, left) : vf{};
  }

  void put(int64_t row, int64_t column, int64_t left, vf sums, vf base) const {
    store(y + row * y_stride + column, sums + base, left);
  }
};

void product(const T* x, int64_t x_stride, const uint32_t* panels, const T* bias, T* y,
             int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
  Dots<T, vf, Biased> dots{x, panels, {bias, y, y_stride}, x_stride, rows, inputs, outputs};
#pragma omp parallel num_threads(threads)
  dots.run();
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
