// Products with weights in 8 bits, laid out in panels: y = x W^T + b, by the CPU's dot products of
// four bytes (AVX-512 VNNI), which are summed exactly. Each output column of W has a scale, and so
// has each row of x, which is brought to 8 bits here.
//
// A few inputs of a language model are far larger than the others, to which a row's scale would
// leave next to nothing. So before they are rounded both sides are spread: multiplied, 64 inputs at
// a time, by a Hadamard matrix H, which gives each number a share of all. As H^T H is 64 times the
// identity, products stay what they are. (Rotations against outliers: QuaRot, arXiv 2404.00456.)
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
constexpr int64_t BLOCK = 64;  // numbers that are spread together, where inputs fill whole blocks
constexpr float ROOT = 8;      // of BLOCK, by which they grow

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

bool is_spread(int64_t inputs) { return inputs % BLOCK == 0; }

// Sums and differences of neighbours at a distance, in each vector.
template <int64_t DISTANCE>
inline vf mixed(vf v) {
  vi from;
  vf sign;
#pragma GCC unroll 16
  for (int64_t i = 0; i < W; i++) {
    from[i] = i ^ DISTANCE;
    sign[i] = i & DISTANCE ? -1 : 1;
  }
  return __builtin_shuffle(v, from) + sign * v;
}

// Multiply a block by H, in place.
inline void spread_block(float* x) {
  constexpr int64_t VECTORS = BLOCK / W;
  vf v[VECTORS];
  for (int64_t i = 0; i < VECTORS; i++)
    v[i] = mixed<8>(mixed<4>(mixed<2>(mixed<1>(load(x + i * W)))));
  for (int64_t distance = 1; distance < VECTORS; distance *= 2)
    for (int64_t i = 0; i < VECTORS; i++)
      if (!(i & distance)) {
        vf low = v[i], high = v[i + distance];
        v[i] = low + high;
        v[i + distance] = low - high;
      }
  for (int64_t i = 0; i < VECTORS; i++) store(x + i * W, v[i]);
}

// A row of a matrix, spread where that can be. There are zeros behind it.
struct Row {
  std::vector<float> numbers;

  float* fit(int64_t inputs) {
    numbers.assign((inputs + W - 1) / W * W, 0);
    return numbers.data();
  }

  // The largest number without its sign; one that is none counts for more than all others.
  float spread(int64_t inputs) {
    float* x = numbers.data();
    if (is_spread(inputs))
      for (int64_t k = 0; k < inputs; k += BLOCK) spread_block(x + k);
    vu most{};
    for (int64_t k = 0; k < inputs; k += W) {
      vu bits = (vu)load(x + k) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    // Sizes, as whole numbers, are in the order of what they mean.
    uint32_t found = _mm512_reduce_max_epu32((__m512i)most);
    float size;
    std::memcpy(&size, &found, sizeof size);
    return size;
  }
};

// What one of a row's units is, where its largest number has this size.
float unit(float size, int64_t inputs) { return size / MOST / (is_spread(inputs) ? ROOT : 1); }

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
    static thread_local Row kept;
    float* from = kept.fit(inputs);
    for (int64_t k = 0; k < inputs; k += W) store(from + k, load(x + k, inputs - k));
    float size = kept.spread(inputs);
    float per_unit = size > 0 ? MOST / size : 0;
    vi sums{};
    for (int64_t k = 0; k < inputs; k += W) {
      vi bytes = whole(load(from + k) * per_unit);
      sums += bytes;
      __m128i narrow = _mm512_cvtsepi32_epi8((__m512i)bytes);
      std::memcpy(&numbers[row * width + k], &narrow, std::min(W, width - k));
    }
    units[row] = unit(size, inputs);
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
#pragma omp parallel num_threads(threads)
  {
    Row row;
    float* from = row.fit(inputs);
#pragma omp for
    for (int64_t i = 0; i < count; i++) {
      for (int64_t k = 0; k < inputs; k++) from[k] = panels[place(columns[i], k, inputs)] - ZERO;
      float one = ((const float*)panels)[scale_place(columns[i], inputs)];
      if (is_spread(inputs)) {
        row.spread(inputs);
        one /= ROOT;
      }
      for (int64_t k = 0; k < inputs; k += W)
        store(to + i * inputs + k, load(from + k) * one, inputs - k);
    }
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
#pragma omp parallel num_threads(threads)
  {
    Row row;
    float* from = row.fit(inputs);
#pragma omp for
    for (int64_t column = 0; column < outputs; column++) {
      for (int64_t k = 0; k < inputs; k++) from[k] = weight[column * stride + k * step];
      float size = row.spread(inputs);
      float per_unit = size > 0 ? MOST / size : 0;
      for (int64_t k = 0; k < inputs; k++)
        ((uint8_t*)panels)[place(column, k, inputs)] = ZERO + std::lrintf(from[k] * per_unit);
      ((float*)panels)[scale_place(column, inputs)] = unit(size, inputs);
    }
  }
}

}  // extern "C"
