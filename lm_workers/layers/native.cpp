// Vector kernels of one decoder layer on a CPU. Compiled for one type T: float32, or bfloat16 with
// -DBFLOAT16. Strides and sizes count numbers, not bytes. reference.py says in torch what each
// function computes.
//
// Every row's numbers depend on that row alone: sums run in the same order whatever the batch, the
// tile or the number of threads. Intermediate results are rounded to T where transformers does.

#include "attention.h"
#include "vectors.h"
#include "words.h"

namespace {

constexpr int64_t PIECE = 32;    // columns of a piece of U
constexpr int64_t TALL = W / 2;  // rows of an update whose sums fit in registers
constexpr int64_t FEW = 16;      // query heads of a tile that read keys and values about once
constexpr int64_t ALONE = 512;   // tokens of context that one thread reads sooner than two share

void normalise(const T* x, const T* weight, float eps, int64_t size, T* out) {
  vf squares{};
  for (int64_t i = 0; i < size; i += W) {
    vf v = load(x + i, size - i);
    squares += v * v;
  }
  float scale = 1.f / std::sqrt(sum(squares) / size + eps);
  for (int64_t i = 0; i < size; i += W) {
    vf v = rounded(load(x + i, size - i) * scale);
    store(out + i, v * load(weight + i, size - i), size - i);
  }
}

void add_row(T* residual, const T* x, int64_t size) {
  for (int64_t i = 0; i < size; i += W)
    store(residual + i, load(residual + i, size - i) + load(x + i, size - i), size - i);
}

// Rotate one head: its halves are the real and the imaginary parts.
void rotate(const T* x, const T* cosine, const T* sine, int64_t size, T* out) {
  int64_t half = size / 2;
  for (int64_t i = 0; i < half; i += W) {
    int64_t n = half - i, j = half + i;
    vf a = load(x + i, n), b = load(x + j, n);
    vf left = rounded(a * load(cosine + i, n)) - rounded(b * load(sine + i, n));
    vf right = rounded(b * load(cosine + j, n)) + rounded(a * load(sine + j, n));
    store(out + i, left, n);
    store(out + j, right, n);
  }
}

// Numbers of a rank, as many as are multiplied at a time filled up.
inline int64_t filled(int64_t rank) { return (rank + PACK - 1) / PACK * PACK; }

// y += U core (V x) of one site, for up to R rows; V x is `low`. U comes transposed, in pieces
// [filled(rank) / PACK, PIECE, PACK].
template <int64_t R>
void update_tile(T* y, int64_t y_stride, const T* low, int64_t low_stride, int64_t rows,
                 const T* cores, int64_t cores_stride, const int64_t* slots, const T* pieces,
                 int64_t rank, int64_t width) {
  const int64_t room = filled(rank);
  std::vector<T> inner(R * room);
  std::vector<float> sums(rank);
  for (int64_t r = 0; r < rows; r++) {
    const T *core = cores + slots[r] * cores_stride, *from = low + r * low_stride;
    for (int64_t i = 0; i < rank; i++) {
      vf acc{};
      for (int64_t j = 0; j < rank; j += W)
        acc += load(core + i * rank + j, rank - j) * load(from + j, rank - j);
      sums[i] = sum(acc);
    }
    for (int64_t i = 0; i < rank; i += W)
      store(&inner[r * room + i], load(&sums[i], rank - i), rank - i);
  }
  for (int64_t o = 0; o < width; o += 2 * W) {
    vf acc[R][2] = {};
    int64_t left[2] = {width - o, std::max<int64_t>(0, width - o - W)};
    const T* from = pieces + o / PIECE * PIECE * room + o % PIECE * PACK;
    for (int64_t j = 0; j < room; j += PACK, from += PIECE * PACK) {
      vf weights[2] = {packed(from, LANES), packed(from + LANES, LANES)};
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int64_t c = 0; c < 2; c++)
          acc[r][c] = dot(acc[r][c], weights[c], &inner[r * room + j]);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int64_t c = 0; c < 2; c++)
        if (r < rows && slots[r] && left[c]) {
          T* to = y + r * y_stride + o + c * W;
          store(to, load(to, left[c]) + acc[r][c], left[c]);
        }
  }
}

// Updates of a group of sites whose outputs lie side by side.
struct Update {
  const T* cores;  // [slots, num_sites, rank, rank]
  int64_t num_sites;
  const T* pieces;         // U of the targets, one after the other
  const int64_t* targets;  // site, first column and width of each
  int64_t num_targets, rank;
};

// An update of a step's rows, which `low` holds V x of, the targets side by side.
struct Late {
  const Update* update;  // null for none
  const int64_t* slots;
  const T* low;
  int64_t stride;

  // y += U core (V x) of `count` rows, no more than TALL, from row `first` on, which is y's.
  void apply(T* y, int64_t y_stride, int64_t first, int64_t count) const {
    if (!update) return;
    const int64_t *mine = slots + first, square = update->rank * update->rank;
    if (std::all_of(mine, mine + count, [](int64_t slot) { return !slot; })) return;
    auto tile = count == 1 ? update_tile<1> : count <= TALL / 2 ? update_tile<TALL / 2>
                                                                : update_tile<TALL>;
    const T* pieces = update->pieces;
    for (int64_t g = 0; g < update->num_targets; g++) {
      const int64_t* target = update->targets + 3 * g;
      tile(y + target[1], y_stride, low + first * stride + g * update->rank, stride, count,
           update->cores + target[0] * square, update->num_sites * square, mine, pieces,
           update->rank, target[2]);
      pieces += (target[2] + PIECE - 1) / PIECE * PIECE * filled(update->rank);
    }
  }
};

// Rows in tiles: as many tiles as threads, where few rows allow it, and none taller than TALL.
int64_t tile_height(int64_t rows, int64_t threads) {
  return std::min(TALL, std::max<int64_t>(1, (rows + threads - 1) / threads));
}

// Update the rows of x and pass each to `use`. Without an update, `few` rows are one thread's.
template <class Use>
void each_row(const Late& late, T* x, int64_t stride, int64_t rows, int64_t few, int64_t threads,
              Use use) {
  int64_t height = tile_height(rows, threads);
#pragma omp parallel for num_threads(threads) if (rows > (late.update ? height : few))
  for (int64_t first = 0; first < rows; first += height) {
    int64_t stop = std::min(rows, first + height);
    late.apply(x + first * stride, stride, first, stop - first);
    for (int64_t t = first; t < stop; t++) use(t, x + t * stride);
  }
}

// residual += x, updated before.
void add(T* residual, T* x, int64_t stride, int64_t rows, int64_t size, const Update* update,
         const int64_t* slots, const T* low, int64_t low_stride, int64_t threads) {
  each_row({update, slots, low, low_stride}, x, stride, rows, 32, threads,
           [=](int64_t t, const T* from) { add_row(residual + t * size, from, size); });
}

// out = norm(x), or residual += x, updated before, and out = norm(residual).
void rms_norm(T* residual, T* x, int64_t stride, const T* weight, float eps, int64_t rows,
              int64_t size, T* out, const Update* update, const int64_t* slots, const T* low,
              int64_t low_stride, int64_t threads) {
  each_row({update, slots, low, low_stride}, x, stride, rows, 32, threads,
           [=](int64_t t, const T* from) {
             if (residual) {
               add_row(residual + t * size, from, size);
               from = residual + t * size;
             }
             normalise(from, weight, eps, size, out + t * size);
           });
}

// Update, norm and rotate queries in place, keys into the cache; copy values into the cache.
void rotate_and_store(T* qkv, int64_t stride, const T* cosine, const T* sine, const T* q_norm,
                      const T* k_norm, float eps, const int64_t* write_slots, T* keys, T* values,
                      int64_t rows, int64_t heads, int64_t kv_heads, int64_t size,
                      const Update* update, const int64_t* slots, const T* low, int64_t low_stride,
                      int64_t threads) {
  each_row({update, slots, low, low_stride}, qkv, stride, rows, 8, threads,
           [=](int64_t t, T* x) {
             int64_t slot = write_slots[t] * kv_heads * size;
             for (int64_t h = 0; h < heads + kv_heads; h++, x += size) {
               const T* norm = h < heads ? q_norm : k_norm;
               if (norm) normalise(x, norm, eps, size, x);
               T* to = h < heads ? x : keys + slot + (h - heads) * size;
               rotate(x, cosine + t * size, sine + t * size, size, to);
             }
             std::memcpy(values + slot, x, kv_heads * size * sizeof(T));
           });
}

// out = silu(x[:size]) * x[size:], updated before.
void silu_mul(T* x, int64_t stride, T* out, int64_t rows, int64_t size, const Update* update,
              const int64_t* slots, const T* low, int64_t low_stride, int64_t threads) {
  each_row({update, slots, low, low_stride}, x, stride, rows, 4, threads,
           [=](int64_t t, const T* row) {
             for (int64_t i = 0; i < size; i += W) {
               int64_t n = size - i;
               vf gate = load(row + i, n);
               gate = rounded(gate / (1.f + exponential(-gate)));
               store(out + t * size + i, gate * load(row + size + i, n), n);
             }
           });
}

// out = index of each row's largest number, the first one where several are equal.
void argmax(const T* x, int64_t stride, int64_t* out, int64_t rows, int64_t size,
            int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (int64_t t = 0; t < rows; t++) {
    const T* row = x + t * stride;
    vf best = splat(load(row, 1)[0]);
    for (int64_t i = 0; i + W <= size; i += W) best = larger(load(row + i), best);
    for (int64_t i = size / W * W; i < size; i++) best = larger(splat(load(row + i, 1)[0]), best);
    float top = largest(best);
    int64_t at = 0;
    while (at + W <= size && !any(load(row + at) == top)) at += W;
    while (at < size && load(row + at, 1)[0] != top) at++;
    out[t] = at < size ? at : 0;
  }
}

// y += U core (V x), with each row's own core.
void update(T* y, int64_t y_stride, int64_t rows, const Update* update, const int64_t* slots,
            const T* low, int64_t low_stride, int64_t threads) {
  each_row({update, slots, low, low_stride}, y, y_stride, rows, 0, threads, [](int64_t, T*) {});
}

// A span is (first row, stop row, tokens of its sequence up to the stop); its blocks are in
// `tables`. A window of 0 is none.
void attend(const T* query, int64_t stride, const T* keys, const T* values, T* out,
            const int64_t* spans, int64_t num_spans, const int64_t* tables, int64_t table_width,
            int64_t heads, int64_t kv_heads, int64_t size, int64_t block, int64_t window,
            float scale, int64_t threads) {
  struct Item {
    int64_t span, first, count, head, share;
  };
  std::vector<Item> items;
  int64_t group = heads / kv_heads, most = 0, tiles = 0;
  for (int64_t s = 0; s < num_spans; s++)
    for (int64_t stop = spans[3 * s + 1], t = spans[3 * s]; t < stop; t += TILE, tiles++) {
      // All heads of a token lie side by side: few rows, which mostly wait for the memory, read
      // them together, unless that leaves threads without work.
      int64_t count = std::min(TILE, stop - t);
      int64_t share = num_spans >= 4 * threads && count * group <= FEW ? kv_heads : 1;
      for (int64_t h = 0; h < kv_heads; h += share) items.push_back({s, t, count, h, share});
      most = std::max(most, share * count * group);
    }
  int64_t number = items.size();
#pragma omp parallel num_threads(threads) if (tiles > 1 || spans[2] > ALONE)
  {
    Scratch scratch(size, kv_heads, most);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < number; i++) {
      const Item& item = items[i];
      int64_t stop = spans[3 * item.span + 1], length = spans[3 * item.span + 2];
      Attention one{query, keys, values, out, tables + item.span * table_width, stride, heads,
                       kv_heads, size, block, window, scale};
      one.tile(scratch, item.head, item.share, item.first, item.count, length - stop + item.first);
    }
  }
}

}  // namespace

CALLED(add)
CALLED(rms_norm)
CALLED(rotate_and_store)
CALLED(silu_mul)
CALLED(argmax)
CALLED(update)
CALLED(attend)
