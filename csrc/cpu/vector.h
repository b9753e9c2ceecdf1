// The compiler's vector types and the few functions on them that the CPU kernels share; the including file sets
// LEAD_FAST_VECTOR_WIDTH (floats a vector) and the instruction set.
//
// No header with inline functions may be included here: the linker could keep this instruction set's copy for everyone.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace lead_fast::cpu {
namespace {

constexpr int kWidth = LEAD_FAST_VECTOR_WIDTH;
typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(kWidth * sizeof(uint16_t))));

inline Floats load(const float* p) {
  Floats x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline Floats load(const uint16_t* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Bits) << 16);
}

// The last n < kWidth values of a row, then zeros.
template <class Stored>
inline Floats load_tail(const Stored* p, int64_t n) {
  Stored tail[kWidth] = {};
  memcpy(tail, p, n * sizeof(Stored));
  return load(tail);
}

inline void store(float* p, Floats x) { memcpy(p, &x, sizeof x); }

// bf16, rounded to nearest even; a NaN stays one.
inline void store(uint16_t* p, Floats x) {
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits is_nan = (Bits)(x != x);
  const Halves h = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), Halves);
  memcpy(p, &h, sizeof h);
}

inline Floats broadcast(float x) { return x - Floats{}; }  // not +: 0 + -0 is 0, which costs an addition

inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

inline float maximum(Floats x) {
  float largest = x[0];
  for (int i = 1; i < kWidth; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// exp(x) = scale * (1 + fraction) for x <= 0: scale = 2^n, fraction = exp(r) - 1 with |r| <= ln(2) / 2, a minimax
// polynomial of relative error 3e-9. Below -87 (the smallest normal number) exp is taken as 0. A NaN passes through
// `fraction`.
struct ExpParts {
  Floats scale, fraction;
};

inline ExpParts exp_parts(Floats x) {
  const float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const Floats shifted = x * log2_e + to_integer;
  const Floats n = shifted - to_integer;
  const Floats r = (x - n * ln2_high) - n * ln2_low;
  Floats q = broadcast(1.40614227e-3f);
  q = q * r + 8.37905904e-3f;
  q = q * r + 4.16647733e-2f;
  q = q * r + 1.66663648e-1f;
  q = q * r + 5.00000044e-1f;
  const Ints exponent = ((Ints)shifted - (Ints)broadcast(to_integer) + 127) << 23;
  return {(Floats)exponent, q * (r * r) + r};
}

inline Floats exp_nonpositive(Floats x) {
  const ExpParts e = exp_parts(x);
  const Floats value = e.scale * e.fraction + e.scale;
  return x < -87.0f ? Floats{} : value;
}

// tanh(u) and its derivative. By e = exp(-2|u|): tanh through e - 1, so that small values keep their digits, and the
// derivative as 4 e / (1 + e)^2, since 1 - tanh^2 has none left near the cap.
struct TanhParts {
  Floats value, slope;
};

inline TanhParts tanh_parts(Floats u) {
  const Floats x = -2.0f * (u < 0 ? -u : u);
  const ExpParts parts = exp_parts(x);
  const Floats expm1 = parts.scale * parts.fraction + (parts.scale - 1.0f);
  const Floats e = parts.scale * parts.fraction + parts.scale;
  const Floats magnitude = x < -87.0f ? broadcast(1.0f) : -expm1 / (2.0f + expm1);
  const Floats slope = x < -87.0f ? Floats{} : 4.0f * e / ((1.0f + e) * (1.0f + e));
  return {u < 0 ? -magnitude : magnitude, slope};
}

}  // namespace
}  // namespace lead_fast::cpu
