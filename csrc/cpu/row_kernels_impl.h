// The row kernels, written once for every instruction set (vector.h); the including file sets LEAD_FAST_ROW_KERNELS,
// the table's name.
//
// A row is read in blocks that stay in L1: raw values -> logits z in fp32, with the label's own logit set apart as
// -inf.
//   pass 1: running maximum m and s = sum_{v != y} exp(z_v - m);  total = s + exp(z_y - m)
//           nll = log(total) + (m - z_y), log1p(s) where z_y is the maximum: both keep their digits near 0
//   pass 2: p_v = exp(z_v - m) / total, p_y - 1 = -s / total, their squares, and (p - y) * dz/da written back
// A row of 49,152 fp32 logits (192 KiB) sits in L2: one read and one write of memory a row.
#pragma once

#include "cpu/row_kernels.h"
#include "cpu/vector.h"

namespace lead_fast::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // floats: 8 KiB

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
