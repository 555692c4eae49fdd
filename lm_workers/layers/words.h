// Functions as Python calls them: with words of 8 bytes for arguments, so that a call can be kept
// and made again. tape.py has the other side.

#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

union Word {
  int64_t whole;
  double real;
  void* at;
};

using Called = void (*)(const Word*);

namespace {

template <class A>
A taken(const Word& word) {
  if constexpr (std::is_pointer_v<A>) return (A)word.at;
  if constexpr (std::is_floating_point_v<A>) return (A)word.real;
  if constexpr (std::is_integral_v<A>) return (A)word.whole;
}

template <class... A, size_t... I>
void call(void (*function)(A...), const Word* words, std::index_sequence<I...>) {
  function(taken<A>(words[I])...);
}

template <class... A>
void call(void (*function)(A...), const Word* words) {
  call(function, words, std::index_sequence_for<A...>{});
}

}  // namespace

#define CALLED(function) \
  extern "C" void call_##function(const Word* words) { call(function, words); }

// Calls one after the other: of each the function, the number of its words, and these.
extern "C" void play(const Word* words, int64_t calls) {
  for (; calls; calls--) {
    ((Called)words[0].at)(words + 2);
    words += 2 + words[1].whole;
  }
}
