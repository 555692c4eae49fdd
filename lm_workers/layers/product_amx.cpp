// Products with bfloat16 weights laid out in panels: y = x W^T + b, by a CPU that multiplies tiles
// of bfloat16 numbers (AMX) and adds up in float32.
//
// A panel holds 2 W output columns. 32 inputs of them are two tiles of 1 KiB, each with two inputs
// of a column in a word; one or two tiles of rows meet them at a time. While rows pass over a panel
// the next one is fetched, little by little; where all pass at once, what comes next in this one. A
// lone tile of rows waits for the memory most of the time: it asks for a line in four, with which
// the CPU fetches the others itself. Where rows do not fill the last tile it begins earlier, and
// some are computed twice, to the same numbers. Every sum runs over the inputs in the same order: a
// row's numbers do not depend on the rows beside it.

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "pairs.h"

#ifndef __AMX_BF16__
#error "this CPU does not multiply tiles of bfloat16 numbers (AMX)"
#endif

namespace {

constexpr int64_t LINE = 64;            // bytes of a tile's row
constexpr int64_t TALL = 16;            // rows of a tile of x, or of sums
constexpr int64_t DEEP = 32;            // inputs of a tile
constexpr int64_t COLUMNS = 2 * W;      // of a panel
constexpr int64_t TILE = DEEP / 2 * W;  // words of a tile of weights
constexpr int64_t STEP = 2 * TILE;      // words of a panel for DEEP inputs
constexpr int64_t AHEAD = 2 * STEP;     // words by which rows that pass at once fetch ahead
constexpr int64_t CACHED = 1 << 18;     // numbers of x that stay in a core's cache meanwhile

// A thread's tiles, while it lives: 0 to 3 for sums, 4 and 5 for rows of x, 6 and 7 for weights.
struct Tiles {
  struct alignas(LINE) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };

  explicit Tiles(int64_t rows) {
    Shapes shapes;
    std::fill_n(shapes.bytes, 8, (uint16_t)LINE);
    std::fill_n(shapes.rows, 6, (uint8_t)rows);
    std::fill_n(shapes.rows + 6, 2, (uint8_t)(DEEP / 2));
    asm("" : "+m"(shapes));  // GCC believes that only the first word is read
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

struct Product {
  const T* x;
  const uint32_t* weight;
  const T* bias;
  T* y;
  int64_t x_stride, y_stride, rows, inputs, outputs;
  const T* rest;  // [rows, DEEP], the inputs that do not fill a tile, and zeros

  int64_t steps() const { return (inputs + DEEP - 1) / DEEP; }
  int64_t panels() const { return (outputs + COLUMNS - 1) / COLUMNS; }
  int64_t height() const { return std::min(rows, TALL); }

  // A panel under the rows from `one` on and, if BOTH, under those from `two` on. It is the turn
  // `turn` of the panel's `turns`.
  template <bool BOTH>
  void tiles(int64_t one, int64_t two, int64_t panel, int64_t turn, int64_t turns) const {
    const uint32_t* w = weight + panel * steps() * STEP;
    const uint32_t* next = w + (turns == 1 ? AHEAD : steps() * STEP);
    const int64_t begin = STEP / W * turn / turns, end = STEP / W * (turn + 1) / turns;
    _tile_zero(0);
    _tile_zero(1);
    if (BOTH) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < steps(); k++, w += STEP, next += STEP) {
      bool whole = (k + 1) * DEEP <= inputs;
      const T* from = whole ? x + k * DEEP : rest;
      int64_t stride = whole ? x_stride : DEEP;
      _tile_stream_loadd(4, from + one * stride, stride * sizeof(T));
      _tile_loadd(6, w, LINE);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w + TILE, LINE);
      _tile_dpbf16ps(1, 4, 7);
      if (BOTH) {
        _tile_stream_loadd(5, from + two * stride, stride * sizeof(T));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (!BOTH && turns == 1)
        for (int64_t i = 0; i < STEP / W; i += 4) __builtin_prefetch(next + i * W, 0, 2);
      else
        for (int64_t i = begin; i < end; i++) __builtin_prefetch(next + i * W, 0, 2);
    }
    alignas(LINE) float sums[2][TALL * COLUMNS];
    _tile_stored(0, sums[0], 2 * LINE);
    _tile_stored(1, sums[0] + W, 2 * LINE);
    if (BOTH) {
      _tile_stored(2, sums[1], 2 * LINE);
      _tile_stored(3, sums[1] + W, 2 * LINE);
    }
    put(sums[0], one, panel * COLUMNS);
    if (BOTH) put(sums[1], two, panel * COLUMNS);
  }

  // Sums of the rows from `row` on and the columns from `column` on.
  void put(const float* sums, int64_t row, int64_t column) const {
    int64_t left = std::min(outputs - column, COLUMNS);
    __mmask32 there = (1ull << left) - 1;
    vf low{}, high{};
    if (bias) {
      low = load(bias + column, left);
      high = load(bias + column + W, std::max<int64_t>(left - W, 0));
    }
    T* to = y + row * y_stride + column;
    for (int64_t r = 0; r < height(); r++, sums += COLUMNS, to += y_stride) {
      __m512bh both =
          _mm512_cvtne2ps_pbh((__m512)(load(sums + W) + high), (__m512)(load(sums) + low));
      _mm512_mask_storeu_epi16(to, there, (__m512i)both);
    }
  }

  // Rows `row` to `stop` of one panel.
  void column(int64_t row, int64_t stop, int64_t panel) const {
    int64_t last = stop - height(), turns = (stop - row + 2 * TALL - 1) / (2 * TALL);
    for (int64_t i = 0; i < turns; i++, row += 2 * TALL) {
      if (row < last)
        tiles<true>(row, std::min(row + TALL, last), panel, i, turns);
      else
        tiles<false>(last, last, panel, i, turns);
    }
  }

  void run(int64_t threads) const {
    int64_t most = std::max<int64_t>(CACHED / inputs / TALL, 2) * TALL;
    int64_t blocks = (rows + most - 1) / most;
#pragma omp parallel num_threads(threads)
    {
      Tiles mine(height());
#pragma omp for collapse(2) schedule(static)
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t panel = 0; panel < panels(); panel++)
          column(b * rows / blocks, (b + 1) * rows / blocks, panel);
    }
  }
};

void product(const T* x, int64_t x_stride, const uint32_t* panels, const T* bias, T* y,
             int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
  if (!rows) return;  // tiles have a row at least
  int64_t left = inputs % DEEP;
  std::vector<T> rest(left ? rows * DEEP : 0);
  for (int64_t r = 0; left && r < rows; r++)
    std::copy_n(x + r * x_stride + inputs - left, left, &rest[r * DEEP]);
  Product{x, panels, bias, y, x_stride, y_stride, rows, inputs, outputs, rest.data()}.run(threads);
}

int64_t place(int64_t column, int64_t k, int64_t inputs) {
  int64_t steps = (inputs + DEEP - 1) / DEEP, tile = k / DEEP * 2 + column % COLUMNS / W;
  int64_t word = column / COLUMNS * steps * STEP + tile * TILE + k % DEEP / 2 * W + column % W;
  return 2 * word + k % 2;
}

}  // namespace

CALLED(product)

extern "C" {

// Ask the system for tiles, for all threads of this process. Zero if it gives them.
int64_t request() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // Linux: ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

// Words of memory for the panels of a weight [outputs, inputs].
int64_t panels_size(int64_t outputs, int64_t inputs) {
  return (outputs + COLUMNS - 1) / COLUMNS * ((inputs + DEEP - 1) / DEEP) * STEP;
}

}  // extern "C"
