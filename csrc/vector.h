// SPDX-License-Identifier: Apache-2.0
// Vectors of sixteen floats, in GCC's vector extension: one AVX-512 register, two AVX2 registers or
// four SSE registers.
#pragma once

#include <cstdint>

// Compile a function, with everything inlined into it, for each instruction set. The loader chooses
// the version for the CPU.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_ISA \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define FOR_EACH_ISA
#endif
#define INLINE static inline __attribute__((always_inline))

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

INLINE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
INLINE void store(float* to, Floats values) { *reinterpret_cast<Floats*>(to) = values; }
INLINE Floats broadcast(float value) { return value - Floats{}; }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

INLINE float sum(Floats values) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += values[i];
  return total;
}

INLINE float largest(Floats values) {
  float maximum = values[0];
  for (int i = 1; i < kLanes; ++i) maximum = values[i] > maximum ? values[i] : maximum;
  return maximum;
}

// e^x, accurate to 2 units in the last place for x from -87 to 88; 0 for smaller x, also -inf.
INLINE Floats exponential(Floats x) {
  const Floats rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats clamped = larger(x, broadcast(-87.0f));
  const Floats power = (clamped * 1.44269504f + rounder) - rounder;
  const Floats rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  const Ints exponent = __builtin_convertvector(power, Ints) << 23;
  union {
    Floats floats;
    Ints ints;
  } result = {p};
  result.ints += exponent;
  return x < broadcast(-87.0f) ? Floats{} : result.floats;
}
