// The tile kernels, written once for every instruction set (vector.h); the including file sets LEAD_FAST_TILE_KERNELS,
// the table's name.
//
// Bytes and flops at (2048, 576, 49152) with AVX-512: a tile's inner loop is 24 multiply-adds of a vector for 2 loads
// and 12 broadcasts, bound by the multipliers; W (113 MB) comes from memory twice a chunk of 256 tokens, 1.8 GB in all,
// fetched ahead by the tiles themselves; the chunk's logits (50 MB) go to memory once and come back once.
#pragma once

#include "cpu/tile_kernels.h"
#include "cpu/vector.h"

namespace lead_fast::cpu {
namespace {

constexpr int64_t kLanes = 2 * kWidth;
constexpr int kTileRows = kWidth == 16 ? 12 : 6;  // two vectors of sums a row fill the registers
constexpr int kUnroll = 8;
constexpr int64_t kGroupColumns = 48;            // of W in d_hidden's tiles: whole cache lines
constexpr int64_t kRowStride = kMostDepth + 16;  // of a tile's rows in the buffer: not in the same cache set

static_assert(kRowUnit % kTileRows == 0 && kRowUnit % kUnroll == 0 && kSoftmaxRows % kRowUnit == 0);
static_assert(kGradientRows % kSoftmaxRows == 0 && kGroupColumns % kTileRows == 0 && kMostTokens <= kMostDepth);

constexpr int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory that later tiles read, fetched while this one is computed: two lines every kUnroll steps.
struct Ahead {
  const char *first, *second;
  int64_t first_step, second_step;  // bytes
};

inline const char* bytes(const float* p) { return reinterpret_cast<const char*>(p); }

// c [kTileRows, kLanes] = or += sum over k < depth of a(i, k) b [k, kLanes], where a(i, k) is
// a[i * kRow + k * kStep]. `depth` is a multiple of kUnroll.
template <int kRow, int kStep, bool kAdd>
__attribute__((noinline)) void multiply_tile(int64_t depth, const float* a, const float* b, float* c, int64_t c_stride,
                                             const Ahead& ahead) {
  const char *first = ahead.first, *second = ahead.second;
  Floats sums[kTileRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; ++i) sums[i][0] = sums[i][1] = Floats{};
  for (int64_t k = 0; k < depth; k += kUnroll) {
    __builtin_prefetch(first, 0, 2);
    __builtin_prefetch(second, 0, 2);
    first += ahead.first_step;
    second += ahead.second_step;
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      const Floats left = load(b), right = load(b + kWidth);
#pragma GCC unroll 12
      for (int i = 0; i < kTileRows; ++i) {
        const Floats value = broadcast(a[i * kRow + u * kStep]);
        sums[i][0] += value * left;
        sums[i][1] += value * right;
      }
      b += kLanes;
    }
    a += kUnroll * kStep;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; ++i) {
    float* row = c + i * c_stride;
    store(row, kAdd ? load(row) + sums[i][0] : sums[i][0]);
    store(row + kWidth, kAdd ? load(row + kWidth) + sums[i][1] : sums[i][1]);
  }
}

// z of `rows` rows from `v` for one vector of tokens, from their `a` at `from`; unless null also dz/da in `slopes`.
// Rows of `z` are `stride` apart, those of `slopes` kWidth. z = a needs no work where it is to be in its place.
void to_logits(const float* from, int64_t v, int64_t rows, const LogitMap& map, float* z, int64_t stride,
               float* slopes) {
  if (z == from && map.bias == nullptr && map.logit_scale == 1.0f && !(map.softcap > 0)) return;
  for (int64_t r = 0; r < rows; ++r) {
    Floats x = load(from + r * kLanes);
    if (map.bias != nullptr) x += map.bias[v + r];
    x *= map.logit_scale;
    if (map.softcap > 0) {
      const TanhParts tanh = tanh_parts(x / map.softcap);
      x = map.softcap * tanh.value;
      if (slopes != nullptr) store(slopes + r * kWidth, map.logit_scale * tanh.slope);
    }
    store(z + r * stride, x);
  }
}

// A block of logits for one vector of tokens. Behind a softcap their `a` stays for the gradient.
void block_softmax(float* a, int64_t v, int64_t rows, const int32_t* label, const LogitMap& map, float* max,
                   float* others, float* label_logit) {
  alignas(64) float buffer[kSoftmaxRows * kWidth];
  const bool capped = map.softcap > 0;
  float* const z = capped ? buffer : a;
  const int64_t stride = capped ? kWidth : kLanes;
  to_logits(a, v, rows, map, z, stride, nullptr);
  for (int lane = 0; lane < kWidth; ++lane) {
    if (v <= label[lane] && label[lane] < v + rows) {
      float& logit = z[(label[lane] - v) * stride + lane];
      label_logit[lane] = logit;
      logit = -INFINITY;
    }
  }
  Floats largest = broadcast(-INFINITY);
  for (int64_t r = 0; r < rows; ++r) {
    const Floats x = load(z + r * stride);
    largest = x > largest ? x : largest;
  }
  const Floats shift = largest == -INFINITY ? Floats{} : largest;
  Floats sums{};
  for (int64_t r = 0; r < rows; ++r) {
    const Floats e = exp_nonpositive(load(z + r * stride) - shift);
    sums += e;
    store(z + r * stride, e);
  }
  store(max, largest);
  store(others, sums);
}

void softmax(const SoftmaxBlocks& blocks, int64_t num_blocks, const int32_t* label, int64_t count,
             const TokenSoftmax& tokens, float* nll) {
  const int64_t stride = blocks.stride;
  for (int64_t half = 0; half < kLanes; half += kWidth) {
    const float *max = blocks.max + half, *others = blocks.others + half;
    Floats largest = broadcast(-INFINITY);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const Floats x = load(max + b * stride);
      largest = x > largest ? x : largest;
    }
    const Floats shift = largest == -INFINITY ? Floats{} : largest;
    double totals[kWidth] = {};
    for (int64_t b = 0; b < num_blocks; ++b) {
      const Floats part = exp_nonpositive(load(max + b * stride) - shift) * load(others + b * stride);
      for (int lane = 0; lane < kWidth; ++lane) totals[lane] += part[lane];
    }
    for (int lane = 0; lane < kWidth; ++lane) {
      const int64_t t = half + lane;
      if (t >= count) {  // p = exp(z - max) * 0, or NaN beside a NaN in W, and of scale 0 either way
        tokens.max[t] = INFINITY;
        tokens.inverse[t] = tokens.label_grad[t] = 0;
        continue;
      }
      const float z_label = label[t] < 0 ? NAN : tokens.label_logit[t];
      const float top = z_label > largest[lane] ? z_label : largest[lane];
      const bool none = largest[lane] == -INFINITY;  // but perhaps a NaN
      const double rest = totals[lane] * (none ? 1 : exp(double(largest[lane]) - top));
      const double distance = double(top) - z_label, total = rest + exp(-distance);
      nll[t] = float(distance == 0 ? log1p(rest) : log(total) + distance);
      tokens.max[t] = top;
      tokens.inverse[t] = float(1 / total);
      tokens.label_grad[t] = float(-rest / total);
    }
    const Floats top = load(tokens.max + half), inverse = load(tokens.inverse + half);
    for (int64_t b = 0; b < num_blocks; ++b) {
      store(blocks.factor + b * stride + half, exp_nonpositive(load(max + b * stride) - top) * inverse);
    }
  }
}

// A block of logits for one vector of tokens, after block_softmax.
void to_gradients(const float* logits, int64_t v, int64_t rows, const int32_t* label, const LogitMap& map,
                  const float* factor, const TokenSoftmax& tokens, double* squares, float* gradients) {
  alignas(64) float buffer[kSoftmaxRows * kWidth], slopes[kSoftmaxRows * kWidth];
  const auto labelled = [&](int lane) { return v <= label[lane] && label[lane] < v + rows; };
  Floats sums{};
  if (map.softcap > 0) {
    to_logits(logits, v, rows, map, buffer, kWidth, slopes);
    for (int lane = 0; lane < kWidth; ++lane) {
      if (labelled(lane)) buffer[(label[lane] - v) * kWidth + lane] = -INFINITY;
    }
    const Floats top = load(tokens.max), inverse = load(tokens.inverse);
    for (int64_t r = 0; r < rows; ++r) {
      const Floats p = exp_nonpositive(load(buffer + r * kWidth) - top) * inverse;
      sums += p * p;
      store(gradients + r * kLanes, p * load(slopes + r * kWidth));
    }
  } else {
    const Floats to_p = load(factor);
    for (int64_t r = 0; r < rows; ++r) {
      const Floats p = load(logits + r * kLanes) * to_p;
      sums += p * p;
      store(gradients + r * kLanes, p * map.logit_scale);
    }
  }
  for (int lane = 0; lane < kWidth; ++lane) {
    squares[lane] += sums[lane];
    if (!labelled(lane)) continue;
    const int64_t r = label[lane] - v;
    const float slope = map.softcap > 0 ? slopes[r * kWidth + lane] : map.logit_scale;
    gradients[r * kLanes + lane] = tokens.label_grad[lane] * slope;
  }
}

// tile [kTileRows, kRowStride] = from [rows, depth], zeros beyond.
inline void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t depth, float* tile) {
  for (int64_t i = 0; i < kTileRows; ++i) {
    const int64_t n = i < rows ? depth : 0;
    memcpy(tile + i * kRowStride, from + i * stride, n * sizeof(float));
    memset(tile + i * kRowStride + n, 0, (rounded_up(depth, kUnroll) - n) * sizeof(float));
  }
}

// tiles [kGroupColumns / kTileRows, depth, kTileRows] = from [rows, columns], zeros beyond; whole cache lines are read.
inline void copy_columns(const float* from, int64_t stride, int64_t rows, int64_t columns, int64_t depth,
                         float* tiles) {
  if (columns < kGroupColumns || rows < depth) memset(tiles, 0, kGroupColumns * depth * sizeof(float));
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t c = 0; c < columns; c += kTileRows) {
      float* to = tiles + c * depth + k * kTileRows;
      if (columns - c >= kTileRows) {
        memcpy(to, from + k * stride + c, kTileRows * sizeof(float));
      } else {
        memcpy(to, from + k * stride + c, (columns - c) * sizeof(float));
      }
    }
  }
}

inline float* logit_rows(const Slab& slab, int64_t panel, int64_t v) {
  return slab.logits + (panel * padded_rows(slab.end - slab.begin) + v - slab.begin) * kLanes;
}

void logits(const Slab& slab, int64_t from, int64_t to, const SoftmaxBlocks& blocks, float* label_logit,
            float* scratch) {
  alignas(64) float tile[kTileRows * kRowStride];
  const int64_t width = slab.width, parts = (width + kMostDepth - 1) / kMostDepth;
  const int64_t depth = rounded_up((width + parts - 1) / parts, kUnroll);
  for (int64_t v = from; v < to; v += kSoftmaxRows) {
    const int64_t rows = smaller(kSoftmaxRows, to - v), block = (v - slab.begin) / kSoftmaxRows * blocks.stride;
    const auto at = [&](int64_t panel) {
      return slab.logits != nullptr ? logit_rows(slab, panel, v) : scratch + panel * kSoftmaxRows * kLanes;
    };
    for (int64_t h = 0; h < width; h += depth) {
      const int64_t n = smaller(depth, width - h);
      const auto multiply = h == 0 ? multiply_tile<kRowStride, 1, false> : multiply_tile<kRowStride, 1, true>;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const float* row = slab.weight + (v + r) * width + h;
        copy_rows(row, width, smaller(kTileRows, rows - r), n, tile);
        for (int64_t panel = 0; panel < slab.panels; ++panel) {
          // The next tile's rows, two a panel.
          const float* next = row + (kTileRows + 2 * panel) * width;
          multiply(rounded_up(n, kUnroll), tile, slab.hidden + (panel * padded_rows(width) + h) * kLanes,
                   at(panel) + r * kLanes, kLanes, {bytes(next), bytes(next + width), 32, 32});
        }
      }
    }
    for (int64_t t = 0; t < slab.panels * kLanes; t += kWidth) {
      block_softmax(at(t / kLanes) + t % kLanes, v, rows, slab.label + t, slab.map, blocks.max + block + t,
                    blocks.others + block + t, label_logit + t);
    }
  }
}

// What the next tiles of d_hidden read: a tile fetches one line of each row of the next columns of W, or at a block's
// end of the next rows, shared out among the panels; and for each panel some lines of its logits in the next block.
inline Ahead after_columns(const Slab& slab, int64_t v, int64_t rows, int64_t h, int64_t panel) {
  const int64_t steps = rounded_up(rows, kUnroll) / kUnroll, width = slab.width;
  const int64_t next = h / kGroupColumns * kGroupColumns + kGroupColumns, tile = h % kGroupColumns / kTileRows;
  const float* from = slab.weight + (next < width ? v * width + next : (v + rows) * width);
  const int64_t line = smaller(tile, kGroupColumns / 16 - 1);
  const int64_t logits_line = smaller(h / kTileRows * steps, kGradientRows * kLanes / 16);
  return {bytes(from + line * 16 + panel * steps * width), bytes(logit_rows(slab, panel, v + rows) + logits_line * 16),
          width * int64_t{sizeof(float)}, 64};
}

void add_hidden_grad(const Slab& slab, int64_t v, int64_t rows, const float* block, float* d_hidden) {
  alignas(64) float tiles[kGradientRows * kGroupColumns];
  const int64_t width = slab.width, depth = rounded_up(rows, kUnroll);
  for (int64_t group = 0; group < width; group += kGroupColumns) {
    const int64_t columns = smaller(kGroupColumns, width - group);
    copy_columns(slab.weight + v * width + group, width, rows, columns, depth, tiles);
    for (int64_t h = group; h < group + columns; h += kTileRows) {
      for (int64_t panel = 0; panel < slab.panels; ++panel) {
        const float* gradients = block + panel * kGradientRows * kLanes;
        float* to = d_hidden + (panel * padded_rows(width) + h) * kLanes;
        multiply_tile<1, kTileRows, true>(depth, tiles + (h - group) * depth, gradients, to, kLanes,
                                          after_columns(slab, v, rows, h, panel));
      }
    }
  }
}

void add_bias_grad(const float* block, int64_t panels, int64_t rows, const float* scale, float* d_bias) {
  for (int64_t r = 0; r < rows; ++r) {
    Floats sums{};
    for (int64_t t = 0; t < panels * kLanes; t += kWidth) {
      const Floats factor = load(scale + t);
      const Floats gradient = load(block + (t / kLanes * kGradientRows + r) * kLanes + t % kLanes);
      sums += factor == 0 ? Floats{} : factor * gradient;
    }
    d_bias[r] += sum(sums);
  }
}

void add_weight_grad(const float* block, int64_t panels, int64_t rows, const float* scaled, const float* scale,
                     int64_t width, float* d_weight) {
  alignas(64) float tile[kTileRows * kRowStride], edge[kTileRows * kLanes];
  const int64_t tokens = panels * kLanes;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int64_t tile_rows = smaller(kTileRows, rows - r);
    for (int64_t t = 0; t < tokens; t += kWidth) {
      const float* from = block + (t / kLanes * kGradientRows + r) * kLanes + t % kLanes;
      for (int64_t i = 0; i < kTileRows; ++i) {
        const Floats gradient = load(from + (i < tile_rows ? i : 0) * kLanes);
        store(tile + i * kRowStride + t, load(scale + t) == 0 ? Floats{} : gradient);
      }
    }
    for (int64_t h = 0; h < width; h += kLanes) {
      float* to = d_weight + r * width + h;
      const int64_t columns = smaller(kLanes, width - h), next_row = width * int64_t{sizeof(float)};
      const Ahead ahead = {bytes(to + kLanes), bytes(to + kLanes + kWidth), next_row, next_row};
      if (tile_rows == kTileRows && columns == kLanes) {
        multiply_tile<kRowStride, 1, true>(tokens, tile, scaled + h * tokens, to, width, ahead);
        continue;
      }
      multiply_tile<kRowStride, 1, false>(tokens, tile, scaled + h * tokens, edge, kLanes, ahead);
      for (int64_t i = 0; i < tile_rows; ++i) {
        for (int64_t c = 0; c < columns; ++c) to[i * width + c] += edge[i * kLanes + c];
      }
    }
  }
}

void gradients(const Slab& slab, const SoftmaxBlocks& blocks, const TokenSoftmax& tokens, const SlabGradients& to) {
  for (int64_t v = slab.begin; v < slab.end; v += kGradientRows) {
    const int64_t rows = smaller(kGradientRows, slab.end - v);
    for (int64_t t = 0; t < slab.panels * kLanes; t += kWidth) {
      const int64_t panel = t / kLanes, half = t % kLanes;
      float* out = to.block + panel * kGradientRows * kLanes + half;
      const TokenSoftmax token = {nullptr, tokens.max + t, tokens.inverse + t, tokens.label_grad + t};
      for (int64_t r = 0; r < rows; r += kSoftmaxRows) {
        const float* factor = blocks.factor + (v + r - slab.begin) / kSoftmaxRows * blocks.stride + t;
        to_gradients(logit_rows(slab, panel, v + r) + half, v + r, smaller(kSoftmaxRows, rows - r), slab.label + t,
                     slab.map, factor, token, to.squares + t, out + r * kLanes);
      }
      for (int64_t r = rows; r < rounded_up(rows, kUnroll); ++r) store(out + r * kLanes, Floats{});
    }
    if (to.d_hidden != nullptr) add_hidden_grad(slab, v, rows, to.block, to.d_hidden);
    if (to.d_bias != nullptr) add_bias_grad(to.block, slab.panels, rows, to.scale, to.d_bias + v);
    if (to.d_weight != nullptr) {
      add_weight_grad(to.block, slab.panels, rows, to.scaled, to.scale, slab.width, to.d_weight + v * slab.width);
    }
  }
}

}  // namespace

extern const TileKernels LEAD_FAST_TILE_KERNELS = {kLanes, logits, softmax, gradients, add_weight_grad};

}  // namespace lead_fast::cpu
