// Vectors as wide as the CPU's registers, and the model's type T beside them. Wider ones would pass
// through memory: the compiler splits them, but does not keep the parts in registers.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t W = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int64_t W = 8;
#else
constexpr int64_t W = 4;
#endif
constexpr int64_t ROWS = 4;  // rows whose sums are held in registers together

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

#ifdef BFLOAT16
using T = bf16;
#else
using T = float;
#endif

inline vf splat(float x) { return x - vf{}; }

// How many numbers of type T lie in one lane of a vector that is read as it is, and in all lanes.
constexpr int64_t PACK = sizeof(float) / sizeof(T), LANES = PACK * W;

// Round to nearest even at bit 16, as torch does.
inline vu half_bits(vf v) {
  vu u = (vu)v;
  return u + 0x7fff + ((u >> 16) & 1);
}

// Between 16 and 32 bits, without sign. GCC takes several instructions where AVX-512 has one.
#if defined(__AVX512F__)
inline vu wide(vh h) { return (vu)_mm512_cvtepu16_epi32((__m256i)h); }
inline vh narrow(vu u) { return (vh)_mm512_cvtepi32_epi16((__m512i)u); }
#else
inline vu wide(vh h) { return __builtin_convertvector(h, vu); }
inline vh narrow(vu u) { return __builtin_convertvector(u, vh); }
#endif

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(wide(h) << 16);
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {
  vh h = narrow(half_bits(v) >> 16);
  std::memcpy(p, &h, sizeof h);
}

// The first n of W numbers; the others read as zero and are not written.
template <class T>
inline vf load(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T part[W] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store(T* p, vf v, int64_t n) {
  if (n >= W) return store(p, v);
  T part[W];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

// The first n of LANES numbers, as they lie.
inline vf packed(const T* p, int64_t n) {
  vf v{};
  if (n >= LANES) {
    std::memcpy(&v, p, sizeof v);
  } else {
    T part[LANES] = {};
    std::memcpy(part, p, n * sizeof(T));
    std::memcpy(&v, part, sizeof v);
  }
  return v;
}

#if defined(BFLOAT16) && defined(__AVX512BF16__)
// To each lane's sum, the products of its two numbers with those of `both`.
inline vf dot(vf sum, vu lanes, uint32_t both) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(both - vu{}), (__m512bh)lanes);
}
#endif

// To each lane's sum, the products of its PACK numbers with the first PACK of `by`.
inline vf dot(vf sum, vf lanes, const T* by) {
#if !defined(BFLOAT16)
  return sum + *by * lanes;
#elif defined(__AVX512BF16__)
  uint32_t both;
  std::memcpy(&both, by, sizeof both);
  return dot(sum, (vu)lanes, both);
#else
  sum += load(by, 1)[0] * (vf)((vu)lanes << 16);
  return sum + load(by + 1, 1)[0] * (vf)((vu)lanes & 0xffff0000u);
#endif
}

inline vf rounded(vf v) {
#ifdef BFLOAT16
  return (vf)(half_bits(v) & 0xffff0000u);
#else
  return v;
#endif
}

// The vector with its lanes moved down by BY, round and round. Indices that the compiler knows.
template <int64_t BY>
inline vf turned(vf v) {
  vi from;
#pragma GCC unroll 16
  for (int64_t i = 0; i < W; i++) from[i] = (i + BY) % W;
  return __builtin_shuffle(v, from);
}
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vf smaller(vf a, vf b) { return a < b ? a : b; }
template <int64_t HALF = W / 2>
inline float sum(vf v) {
  v += turned<HALF>(v);
  if constexpr (HALF > 1) return sum<HALF / 2>(v);
  return v[0];
}
template <int64_t HALF = W / 2>
inline float largest(vf v) {
  v = larger(v, turned<HALF>(v));
  if constexpr (HALF > 1) return largest<HALF / 2>(v);
  return v[0];
}
inline bool any(vi v) {
  int32_t found = 0;
  for (int64_t i = 0; i < W; i++) found |= v[i];
  return found != 0;
}

// e^x to about two units in the last place; below -87 it gives e^-87, close enough to zero.
inline vf exponential(vf x) {
  x = smaller(larger(x, splat(-87.f)), splat(88.f));
  vf scaled = x * 1.44269504f;
  vi n = __builtin_convertvector(scaled + (scaled < 0 ? splat(-.5f) : splat(.5f)), vi);
  vf whole = __builtin_convertvector(n, vf);
  vf r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * (vf)((n + 127) << 23);
}

}  // namespace
