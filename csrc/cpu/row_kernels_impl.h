// The row kernels, written once with the compiler's vector types; the including file sets LEAD_FAST_VECTOR_WIDTH
// (floats a vector), LEAD_FAST_ROW_KERNELS (the table's name) and the instruction set.
//
// A row is read in blocks that stay in L1: raw values -> logits z in fp32, with the label's own logit set apart as
// -inf.
//   pass 1: running maximum m and s = sum_{v != y} exp(z_v - m);  total = s + exp(z_y - m)
//           nll = log(total) + (m - z_y), log1p(s) where z_y is the maximum: both keep their digits near 0
//   pass 2: p_v = exp(z_v - m) / total, p_y - 1 = -s / total, their squares, and (p - y) * dz/da written back
// A row of 49,152 fp32 logits (192 KiB) sits in L2: one read and one write of memory a row.
//
// No header with inline functions may be included here: the linker could keep this instruction set's copy for everyone.
#pragma once

#include <math.h>
#include <string.h>

#include "cpu/row_kernels.h"

namespace lead_fast::cpu {
namespace {

constexpr int kWidth = LEAD_FAST_VECTOR_WIDTH;
constexpr int64_t kBlock = 2048;  // floats: 8 KiB
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

inline Floats broadcast(float x) { return Floats{} + x; }

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

constexpr int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// a[begin, begin + n) as logits in `z`, padded to whole vectors with -inf; with a cap and unless null also their
// derivatives dz/da in `slopes`.
template <class Stored>
inline void load_logits(const Stored* a, int64_t begin, int64_t n, const LogitMap& map, float* z, float* slopes) {
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(z + i, load(a + begin + i));
  if (whole < n) store(z + whole, load_tail(a + begin + whole, n - whole));
  if (map.bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) z[i] += map.bias[begin + i];
  }
  if (map.logit_scale != 1.0f) {
    for (int64_t i = 0; i < n; i += kWidth) store(z + i, load(z + i) * map.logit_scale);
  }
  if (map.softcap > 0) {
    for (int64_t i = 0; i < n; i += kWidth) {
      const TanhParts tanh = tanh_parts(load(z + i) / map.softcap);
      store(z + i, map.softcap * tanh.value);
      if (slopes != nullptr) store(slopes + i, map.logit_scale * tanh.slope);
    }
  }
  for (int64_t i = n; i < padded(n); ++i) z[i] = -INFINITY;
}

// The first n < kWidth values of x.
template <class Stored>
inline void store_tail(Stored* p, Floats x, int64_t n) {
  Stored tail[kWidth];
  store(tail, x);
  memcpy(p, tail, n * sizeof(Stored));
}

template <class Stored>
RowLoss loss(Stored* a, int64_t label, const LogitMap& map, bool gradient) {
  alignas(64) float z[kBlock];
  float z_label = 0, max_others = -INFINITY;
  double others = 0;  // sum over v != label of exp(z_v - max_others)
  for (int64_t begin = 0; begin < map.vocab; begin += kBlock) {
    const int64_t n = map.vocab - begin < kBlock ? map.vocab - begin : kBlock;
    load_logits(a, begin, n, map, z, nullptr);
    if (begin <= label && label < begin + n) {
      z_label = z[label - begin];
      z[label - begin] = -INFINITY;
    }
    Floats block_max = broadcast(-INFINITY);
    for (int64_t i = 0; i < n; i += kWidth) block_max = load(z + i) > block_max ? load(z + i) : block_max;
    if (maximum(block_max) > max_others) {
      others *= exp(double(max_others) - maximum(block_max));
      max_others = maximum(block_max);
    }
    const float shift = max_others == -INFINITY ? 0 : max_others;
    Floats block_sum{};
    for (int64_t i = 0; i < n; i += kWidth) block_sum += exp_nonpositive(load(z + i) - shift);
    others += sum(block_sum);
  }

  const float max = z_label > max_others ? z_label : max_others;
  others *= exp(double(max_others) - max);
  const double distance = double(max) - z_label;
  const double total = others + exp(-distance);
  RowLoss result = {float(distance == 0 ? log1p(others) : log(total) + distance), 0};
  if (!gradient) return result;

  const float inverse = float(1 / total), label_grad = float(-others / total);
  double squares = double(label_grad) * label_grad;
  alignas(64) float slopes[kBlock];
  for (int64_t begin = 0; begin < map.vocab; begin += kBlock) {
    const int64_t n = map.vocab - begin < kBlock ? map.vocab - begin : kBlock;
    const bool has_label = begin <= label && label < begin + n;
    load_logits(a, begin, n, map, z, slopes);
    if (has_label) z[label - begin] = -INFINITY;
    Floats block_squares{};
    for (int64_t i = 0; i < n; i += kWidth) {
      const Floats p = exp_nonpositive(load(z + i) - max) * inverse;
      block_squares += p * p;
      store(z + i, map.softcap > 0 ? p * load(slopes + i) : p * map.logit_scale);
    }
    squares += sum(block_squares);
    if (has_label) z[label - begin] = label_grad * (map.softcap > 0 ? slopes[label - begin] : map.logit_scale);
    const int64_t whole = n / kWidth * kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) store(a + begin + i, load(z + i));
    if (whole < n) store_tail(a + begin + whole, load(z + whole), n - whole);
  }
  result.logit_grad_sq = float(squares);
  return result;
}

double dot(const float* x, const float* y, int64_t n) {
  double total = 0;
  int64_t i = 0;
  for (; i + kWidth <= n;) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    Floats block{};
    for (; i + kWidth <= end; i += kWidth) block += load(x + i) * load(y + i);
    total += sum(block);
  }
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

template <class Stored, class Scaled>
void scale(const Stored* in, float factor, Scaled* out, int64_t n) {
  if (factor == 0) {
    memset(out, 0, n * sizeof(Scaled));
    return;
  }
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(out + i, factor * load(in + i));
  if (whole < n) store_tail(out + whole, factor * load_tail(in + whole, n - whole), n - whole);
}

template <class Stored>
void add(const Stored* in, float factor, float* sum, int64_t n) {
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(sum + i, load(sum + i) + factor * load(in + i));
  if (whole < n) {
    store_tail(sum + whole, load_tail(sum + whole, n - whole) + factor * load_tail(in + whole, n - whole), n - whole);
  }
}

}  // namespace

extern const RowKernels LEAD_FAST_ROW_KERNELS = {
    {loss<float>, scale<float, float>, scale<float, uint16_t>, add<float>},
    {loss<uint16_t>, scale<uint16_t, float>, scale<uint16_t, uint16_t>, add<uint16_t>},
    dot,
};

}  // namespace lead_fast::cpu
