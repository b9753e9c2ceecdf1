// A chunk of tokens goes through the head twice, each thread with its own slab of the vocabulary:
//   logits of the slab and their share of every token's softmax; then the whole softmax, token by token;
//   gradients of the slab's logits, its part of d_hidden, its rows of d_weight; then the sum of the parts.
// The logits of one chunk are all that is ever held. Results depend on the number of threads, as those of torch.mm do,
// and on nothing else.
#include "cpu/tiled_loss.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "cpu/matmul.h"
#include "cpu/scaled_columns.h"
#include "cpu/tile_kernels.h"

namespace lead_fast::cpu {

namespace {

using torch::stable::parallel_for;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class TiledLoss {
 public:
  TiledLoss(const float* hidden, const float* weight, int64_t width, const LogitMap& map,
            const SupervisedTokens& tokens, const TileKernels& kernels, LossResults<float>& results)
      : hidden_(hidden),
        weight_(weight),
        width_(width),
        map_(map),
        tokens_(tokens),
        results_(results),
        kernels_(kernels) {
    const int64_t chunks = ceil_div(tokens.size(), kMostTokens);
    panels_ = chunks == 0 ? 0 : ceil_div(ceil_div(tokens.size(), chunks), lanes_);
    slabs_ = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, ceil_div(map.vocab, kGradientRows));
  }

  void run(bool gradient) {
    for (int64_t begin = 0; begin < tokens_.size(); begin += panels_ * lanes_) {
      const int64_t count = std::min(panels_ * lanes_, tokens_.size() - begin);
      const TokenPanels chunk = pack(begin, count);
      softmax(chunk, begin, count);
      if (gradient) gradients(chunk, begin, count);
    }
  }

 private:
  template <class Body>
  void each_slab(const Body& body) {
    const int64_t units = ceil_div(map_.vocab, kGradientRows);
    parallel_for(0, slabs_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * units / slabs_ * kGradientRows, last = (s + 1) * units / slabs_ * kGradientRows;
        body(s, first, std::min(last, map_.vocab));
      }
    });
  }

  TokenPanels pack(int64_t begin, int64_t count) {
    const int64_t panels = ceil_div(count, lanes_), lanes = panels * lanes_, rows = padded_rows(width_);
    float* packed = reserve(packed_, lanes * rows);
    parallel_for(0, panels, 1, [&](int64_t from, int64_t to) {
      std::memset(packed + from * rows * lanes_, 0, (to - from) * rows * lanes_ * sizeof(float));
      for (int64_t t = from * lanes_; t < std::min(to * lanes_, count); ++t) {
        float* lane = packed + t / lanes_ * rows * lanes_ + t % lanes_;
        const float* row = hidden_ + (begin + t) * width_;
        for (int64_t h = 0; h < width_; ++h) lane[h * lanes_] = row[h];
      }
    });
    label_.assign(lanes, -1);
    for (int64_t t = 0; t < count; ++t) label_[t] = static_cast<int32_t>(tokens_.label[begin + t]);
    float* logits = reserve(logits_, lanes * padded_rows(map_.vocab));
    return {panels, width_, map_, weight_, packed, label_.data(), logits};
  }

  void softmax(const TokenPanels& chunk, int64_t begin, int64_t count) {
    const int64_t lanes = chunk.panels * lanes_;
    slab_max_.assign(slabs_ * lanes, -kInfinity);
    slab_others_.assign(slabs_ * lanes, 0);
    label_logit_.assign(lanes, 0);
    each_slab([&](int64_t s, int64_t first, int64_t last) {
      kernels_.logits(chunk, first, last, {&slab_max_[s * lanes], &slab_others_[s * lanes], label_logit_.data()});
    });
    // Lanes without a token: p = exp(z - inf) * 0.
    max_.assign(lanes, kInfinity);
    inverse_.assign(lanes, 0);
    label_grad_.assign(lanes, 0);
    for (int64_t t = 0; t < count; ++t) {
      float max_others = -kInfinity;
      for (int64_t i = t; i < slabs_ * lanes; i += lanes) max_others = std::max(max_others, slab_max_[i]);
      const float z_label = label_[t] < 0 ? std::nanf("") : label_logit_[t];
      max_[t] = z_label > max_others ? z_label : max_others;
      double others = 0;
      for (int64_t i = t; i < slabs_ * lanes; i += lanes) {
        const bool none = slab_max_[i] == -kInfinity;  // but perhaps a NaN
        others += slab_others_[i] * (none ? 1 : std::exp(double(slab_max_[i]) - max_[t]));
      }
      const double distance = double(max_[t]) - z_label, total = others + std::exp(-distance);
      results_.nll[begin + t] = float(distance == 0 ? std::log1p(others) : std::log(total) + distance);
      inverse_[t] = float(1 / total);
      label_grad_[t] = float(-others / total);
    }
  }

  void gradients(const TokenPanels& chunk, int64_t begin, int64_t count) {
    const int64_t lanes = chunk.panels * lanes_, part = padded_rows(width_) * lanes;
    squares_.assign(slabs_ * lanes, 0);
    float* d_parts = results_.d_hidden == nullptr ? nullptr : reserve(d_parts_, slabs_ * part);
    scale_.assign(lanes, 0);
    std::copy_n(&tokens_.scale[begin], count, scale_.begin());
    const float* scaled = results_.d_weight == nullptr ? nullptr : scale_rows(begin, count, lanes);
    each_slab([&](int64_t s, int64_t first, int64_t last) {
      float* d_part = d_parts == nullptr ? nullptr : d_parts + s * part;
      if (d_part != nullptr) std::memset(d_part, 0, part * sizeof(float));
      kernels_.gradients(chunk, first, last, {max_.data(), inverse_.data(), label_grad_.data()},
                         {&squares_[s * lanes], d_part, scaled, scale_.data(), results_.d_weight, results_.d_bias});
    });
    for (int64_t t = 0; t < count; ++t) {
      double squares = double(label_grad_[t]) * label_grad_[t];
      for (int64_t i = t; i < slabs_ * lanes; i += lanes) squares += squares_[i];
      results_.logit_grad_sq[begin + t] = float(squares);
    }
    if (d_parts != nullptr) sum_parts(d_parts, begin, count, lanes);
  }

  const float* scale_rows(int64_t begin, int64_t count, int64_t lanes) {
    float* scaled = reserve(scaled_, ceil_div(width_, lanes_) * lanes_ * lanes);
    scaled_columns(hidden_ + begin * width_, scale_.data(), count, width_, lanes, lanes_, row_kernels().f32, scaled);
    return scaled;
  }

  void sum_parts(const float* d_parts, int64_t begin, int64_t count, int64_t lanes) {
    const int64_t rows = padded_rows(width_);
    parallel_for(0, count, grain(width_), [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        const float* lane = d_parts + t / lanes_ * rows * lanes_ + t % lanes_;
        float* row = results_.d_hidden + (begin + t) * width_;
        for (int64_t h = 0; h < width_; ++h) {
          float sum = 0;
          for (int64_t s = 0; s < slabs_; ++s) sum += lane[s * rows * lanes + h * lanes_];
          row[h] = sum;
        }
      }
    });
  }

  const float *hidden_, *weight_;
  int64_t width_;
  LogitMap map_;
  const SupervisedTokens& tokens_;
  LossResults<float>& results_;
  const TileKernels& kernels_;
  const int64_t lanes_ = kernels_.lanes;
  int64_t panels_, slabs_;  // panels of a whole chunk
  std::optional<Tensor> packed_, logits_, scaled_, d_parts_;
  std::vector<int32_t> label_;
  std::vector<float> slab_max_, label_logit_, max_, inverse_, label_grad_, scale_;
  std::vector<double> slab_others_, squares_;
};

}  // namespace

void tiled_loss(const float* hidden, const float* weight, int64_t width, const LogitMap& map,
                const SupervisedTokens& tokens, const TileKernels& kernels, bool gradient,
                LossResults<float>& results) {
  TiledLoss(hidden, weight, width, map, tokens, kernels, results).run(gradient);
}

}  // namespace lead_fast::cpu
