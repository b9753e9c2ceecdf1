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

// Rows of a block of inner products, by kGramColumns: as many sums as the registers hold beside their factors.
constexpr int kGramRows = kWidth == 16 ? 4 : 2, kGramColumns = 4;

inline float sum_by_quads(Floats x) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad quads[kWidth / 4];
  memcpy(quads, &x, sizeof x);
  Quad total = quads[0];
  for (int i = 1; i < kWidth / 4; ++i) total += quads[i];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// out[r][c] = <row r of a, row c of b>
inline void inner_products(const float* const (&a)[kGramRows], const float* const (&b)[kGramColumns], int64_t width,
                           float (&out)[kGramRows][kGramColumns]) {
  Floats sums[kGramRows][kGramColumns];
  for (auto& row : sums) {
    for (Floats& sum : row) sum = Floats{};
  }
  const auto add = [&](const auto& part) {
    Floats columns[kGramColumns];
    for (int c = 0; c < kGramColumns; ++c) columns[c] = part(b[c]);
    for (int r = 0; r < kGramRows; ++r) {
      const Floats x = part(a[r]);
      for (int c = 0; c < kGramColumns; ++c) sums[r][c] += x * columns[c];
    }
  };
  const int64_t whole = width / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) add([i](const float* row) { return load(row + i); });
  if (whole < width) add([whole, width](const float* row) { return load_tail(row + whole, width - whole); });
  for (int r = 0; r < kGramRows; ++r) {
    for (int c = 0; c < kGramColumns; ++c) out[r][c] = sum_by_quads(sums[r][c]);
  }
}

// A few columns stay in L1 while all the rows go by.
double gram(const float* d, const float* h, int64_t begin, int64_t end, int64_t width) {
  double total = 0;
  for (int64_t u = 0; u < end; u += kGramColumns) {
    for (int64_t t = begin + (u > begin ? (u - begin) / kGramRows * kGramRows : 0); t < end; t += kGramRows) {
      const float *d_rows[kGramRows], *h_rows[kGramRows], *d_columns[kGramColumns], *h_columns[kGramColumns];
      for (int r = 0; r < kGramRows; ++r) {
        const int64_t row = (t + r < end ? t + r : end - 1) * width;
        d_rows[r] = d + row, h_rows[r] = h + row;
      }
      for (int c = 0; c < kGramColumns; ++c) {
        const int64_t row = (u + c < end ? u + c : end - 1) * width;
        d_columns[c] = d + row, h_columns[c] = h + row;
      }
      float x[kGramRows][kGramColumns], y[kGramRows][kGramColumns];
      inner_products(d_rows, d_columns, width, x);
      inner_products(h_rows, h_columns, width, y);
      for (int r = 0; r < kGramRows; ++r) {
        for (int c = 0; c < kGramColumns; ++c) {
          if (t + r >= end || u + c > t + r) continue;
          total += (u + c < t + r ? 2.0 : 1.0) * x[r][c] * y[r][c];
        }
      }
    }
  }
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
    gram,
};

}  // namespace lead_fast::cpu
