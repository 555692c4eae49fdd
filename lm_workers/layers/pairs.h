// What layouts of bfloat16 weights in panels have in common: how a weight gets there, and how its
// numbers are read again. The file that includes this says where each number is.

#pragma once

#include "vectors.h"
#include "words.h"

namespace {

// Where in the panels, as numbers, an output column of a weight has its number k of `inputs`.
int64_t place(int64_t column, int64_t k, int64_t inputs);

// The weights of some output columns, as they were.
void rows(const T* panels, const int64_t* columns, T* to, int64_t count, int64_t inputs,
          int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = 0; k < inputs; k++) to[i * inputs + k] = panels[place(columns[i], k, inputs)];
}

}  // namespace

CALLED(rows)

// Lay a weight out into `panels`, which hold zeros; those that it does not fill stay.
extern "C" void lay_out(const T* weight, int64_t stride, int64_t step, int64_t outputs,
                        int64_t inputs, T* panels, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t column = 0; column < outputs; column++)
    for (int64_t k = 0; k < inputs; k++)
      panels[place(column, k, inputs)] = weight[column * stride + k * step];
}
