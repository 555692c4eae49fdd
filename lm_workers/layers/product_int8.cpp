// Products with weights in 8 bits, laid out in panels: y = x W^T + b, by the CPU's dot products of
// four bytes (AVX-512 VNNI), which are summed exactly. Each output column of W has a scale, and so
// has each row of x, which is brought to 8 bits here.
//
// The instruction takes one side without sign: weights are stored 128 too large, and 128 times the
// sum of a row is taken from its products. Behind the words of a panel lie its columns' scales.

#include <algorithm>
#include <vector>

#include "dots.h"
#include "words.h"

#ifndef __AVX512VNNI__
#error "this CPU has no dot products of bytes (AVX-512 VNNI)"
#endif

namespace {

constexpr float MOST = 127;  // of a signed byte, both ways
constexpr int64_t ZERO = 128;

int64_t words_of(int64_t inputs) { return (inputs + 3) / 4; }

int64_t panel_size(int64_t inputs) { return (words_of(inputs) + 1) * COLUMNS; }

// Where in the panels, as bytes, an output column of a weight has its number k of `inputs`.
int64_t place(int64_t column, int64_t k, int64_t inputs) {
  int64_t word = column / COLUMNS * panel_size(inputs) + k / 4 * COLUMNS + column % COLUMNS;
  return 4 * word + k % 4;
}

// Where in the panels, as words, it has its scale.
int64_t scale_place(int64_t column, int64_t inputs) {
  return (column / COLUMNS + 1) * panel_size(inputs) - COLUMNS + column % COLUMNS;
}

inline vi whole(vf v) { return (vi)_mm512_cvtps_epi32((__m512)v); }

// The largest of the numbers without their signs; one that is none counts for more than all others.
inline float largest_size(const T* x, int64_t n) {
  vu most{};
  for (int64_t k = 0; k < n; k += W) {
    vu bits = (vu)load(x + k, n - k) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  // Sizes, as whole numbers, are in the order of what they mean.
  uint32_t found = _mm512_reduce_max_epu32((__m512i)most);
  float size;
  std::memcpy(&size, &found, sizeof size);
  return size;
}

// Rows of x in 8 bits, with zeros up to whole words; what one of their units is, and 128 times
// their sums. It keeps its memory: asked for anew it may be fresh pages.
struct Bytes {
  std::vector<int8_t> numbers;
  std::vector<float> units;
  std::vector<int32_t> excess;
  int64_t width = 0;

  void fit(int64_t rows, int64_t inputs) {
    width = 4 * words_of(inputs);
    if ((int64_t)numbers.size() < rows * width) numbers.resize(rows * width);
    if ((int64_t)units.size() < rows) units.resize(rows), excess.resize(rows);
  }

  void fill(int64_t row, const T* x, int64_t inputs) {
    float size = largest_size(x, inputs);
    float per_unit = size > 0 ? MOST / size : 0;
    vi sums{};
    for (int64_t k = 0; k < inputs; k += W) {
      vi bytes = whole(load(x + k, inputs - k) * per_unit);
      sums += bytes;
      __m128i narrow = _mm512_cvtsepi32_epi8((__m512i)bytes);
      std::memcpy(&numbers[row * width + k], &narrow, std::min(W, width - k));
    }
    units[row] = size / MOST;
    excess[row] = ZERO * _mm512_reduce_add_epi32((__m512i)sums);
  }
};

struct Scaled {
  static constexpr int64_t MORE = COLUMNS;

  const Bytes& x;
  const float* panels;
  const T* bias;
  T* y;
  int64_t y_stride;

  struct Numbers {
    vf scale, base;
  };

  static vi dot(vi sums, vu weights, uint32_t four) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)(four - vu{}));
  }

  Numbers at(int64_t column, int64_t left) const {
    if (left <= 0) return Numbers();
    return {load(panels + scale_place(column, x.width)), bias ? load(bias + column, left) : vf{}};
  }

  void put(int64_t row, int64_t column, int64_t left, vi sums, const Numbers& of) const {
    vf exact = __builtin_convertvector(sums - x.excess[row], vf);
    store(y + row * y_stride + column, exact * (of.scale * x.units[row]) + of.base, left);
  }
};

void product(const T* x, int64_t x_stride, const uint32_t* panels, const T* bias, T* y,
             int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
  static thread_local Bytes kept;
  Bytes& bytes = kept;  // the caller's, for all threads
  bytes.fit(rows, inputs);
  Scaled scaled{bytes, (const float*)panels, bias, y, y_stride};
  Dots<int8_t, vi, Scaled> dots{bytes.numbers.data(), panels, scaled, bytes.width,
                                rows, bytes.width, outputs};
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) bytes.fill(r, x + r * x_stride, inputs);
    dots.run();
  }
}

// The weights of some output columns, as near as they are stored.
void rows(const uint8_t* panels, const int64_t* columns, T* to, int64_t count, int64_t inputs,
          int64_t threads) {
  const float* words = (const float*)panels;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = 0; k < inputs; k++) {
      int64_t byte = panels[place(columns[i], k, inputs)];
      vf number = splat((float)(byte - ZERO) * words[scale_place(columns[i], inputs)]);
      store(to + i * inputs + k, number, 1);
    }
}

}  // namespace

CALLED(product)
CALLED(rows)

extern "C" {

// Words of memory for the panels of a weight [outputs, inputs].
int64_t panels_size(int64_t outputs, int64_t inputs) {
  return (outputs + COLUMNS - 1) / COLUMNS * panel_size(inputs);
}

// Bring a weight to 8 bits, and into its place in `panels`.
void lay_out(const float* weight, int64_t stride, int64_t step, int64_t outputs, int64_t inputs,
             uint32_t* panels, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t column = 0; column < outputs; column++) {
    const float* from = weight + column * stride;
    float size = 0;
    for (int64_t k = 0; k < inputs; k++) size = std::max(size, std::fabs(from[k * step]));
    float per_unit = size > 0 ? MOST / size : 0;
    for (int64_t k = 0; k < inputs; k++)
      ((uint8_t*)panels)[place(column, k, inputs)] = ZERO + std::lrintf(from[k * step] * per_unit);
    ((float*)panels)[scale_place(column, inputs)] = size / MOST;
  }
}

}  // extern "C"
