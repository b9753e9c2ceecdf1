// A chunk of tokens goes through the head twice, each thread with its own slab of the vocabulary:
//   logits of the slab and their share of every token's softmax; then the whole softmax, token by token;
//   gradients of the slab's logits, its part of d_hidden, its rows of d_weight; then the sum of the parts.
// Where the slabs' parts of d_hidden would outgrow the logits, there are fewer slabs, and threads share the tokens as
// well. Held are the logits of one chunk, in memory that the process keeps, and these parts. Results depend on the
// number of threads, as those of torch.mm do, and on nothing else.
#include "cpu/tiled_loss.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "cpu/kept_buffer.h"
#include "cpu/matmul.h"
#include "cpu/scaled_columns.h"
#include "cpu/tile_kernels.h"

namespace lead_fast::cpu {

namespace {

using torch::stable::parallel_for;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t kSmallParts = int64_t{64} << 20;  // bytes of d_hidden's parts that need no reason
constexpr int64_t kSumColumns = 64;
constexpr int64_t kLeastTokens = 32;  // whose softmax is worth another thread

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
    panels_ = ceil_div(ceil_div(tokens.size(), chunks), lanes_);
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    slabs_ = std::min(threads, ceil_div(map.vocab, kRowUnit));
    if (results.d_weight != nullptr || results.d_bias != nullptr) return;  // two groups would add to one row
    const int64_t small_rows = kSmallParts / (panels_ * lanes_ * int64_t{sizeof(float)});
    slabs_ = std::clamp<int64_t>(std::max(map.vocab, small_rows) / width, 1, slabs_);
    groups_ = std::clamp<int64_t>(threads / slabs_, 1, panels_);
  }

  void run(bool gradient) {
    for (int64_t begin = 0; begin < tokens_.size(); begin += panels_ * lanes_) {
      const int64_t count = std::min(panels_ * lanes_, tokens_.size() - begin);
      const Slab chunk = pack(begin, count);
      softmax(chunk, begin, count);
      if (gradient) gradients(chunk, begin, count);
    }
  }

 private:
  // What one thread does: a slab for some panels of the chunk, the first of which is that of `token`.
  struct Share {
    int64_t number, slab_number, token;
    Slab slab;
  };

  template <class Body>
  void each_share(const Slab& chunk, const Body& body) {
    const int64_t units = ceil_div(map_.vocab, kRowUnit);
    parallel_for(0, slabs_ * groups_, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t number = i / groups_, group = i % groups_;
        const int64_t panel = group * chunk.panels / groups_, last = (group + 1) * chunk.panels / groups_;
        Slab slab = chunk;
        slab.begin = number * units / slabs_ * kRowUnit;
        slab.end = std::min((number + 1) * units / slabs_ * kRowUnit, map_.vocab);
        slab.panels = last - panel;
        slab.hidden += panel * padded_rows(width_) * lanes_;
        slab.label += panel * lanes_;
        slab.logits += (slab.begin * chunk.panels + panel * padded_rows(slab.end - slab.begin)) * lanes_;
        body(Share{i, number, panel * lanes_, slab});
      }
    });
  }

  // The chunk, before it is shared out.
  Slab pack(int64_t begin, int64_t count) {
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
    float* logits = logits_.reserve(lanes * padded_rows(map_.vocab));  // of one slab after the other
    return {0, map_.vocab, panels, width_, map_, weight_, packed, label_.data(), logits};
  }

  void softmax(const Slab& chunk, int64_t begin, int64_t count) {
    const int64_t lanes = chunk.panels * lanes_;
    slab_max_.assign(slabs_ * lanes, -kInfinity);
    slab_others_.assign(slabs_ * lanes, 0);
    label_logit_.assign(lanes, 0);
    each_share(chunk, [&](const Share& share) {
      const int64_t t = share.slab_number * lanes + share.token;
      kernels_.logits(share.slab, {&slab_max_[t], &slab_others_[t], &label_logit_[share.token]});
    });
    // Lanes without a token: p = exp(z - inf) * 0, or NaN beside a NaN in W, and of scale 0 either way.
    max_.assign(lanes, kInfinity);
    inverse_.assign(lanes, 0);
    label_grad_.assign(lanes, 0);
    parallel_for(0, count, kLeastTokens, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) finish_softmax(t, lanes, results_.nll[begin + t]);
    });
  }

  void finish_softmax(int64_t t, int64_t lanes, float& nll) {
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
    nll = float(distance == 0 ? std::log1p(others) : std::log(total) + distance);
    inverse_[t] = float(1 / total);
    label_grad_[t] = float(-others / total);
  }

  void gradients(const Slab& chunk, int64_t begin, int64_t count) {
    const int64_t lanes = chunk.panels * lanes_, part = padded_rows(width_) * lanes;
    squares_.assign(slabs_ * lanes, 0);
    float* d_parts = results_.d_hidden == nullptr ? nullptr : reserve(d_parts_, slabs_ * part);
    scale_.assign(lanes, 0);
    std::copy_n(&tokens_.scale[begin], count, scale_.begin());
    const float* scaled = results_.d_weight == nullptr ? nullptr : scale_rows(begin, count, lanes);
    const int64_t block = chunk.panels * lanes_ * kGradientRows;
    float* blocks = reserve(blocks_, slabs_ * groups_ * block);
    each_share(chunk, [&](const Share& share) {
      const int64_t t = share.token, columns = padded_rows(width_) * lanes_;
      float* d_part = d_parts == nullptr ? nullptr : d_parts + share.slab_number * part + t / lanes_ * columns;
      if (d_part != nullptr) std::memset(d_part, 0, share.slab.panels * columns * sizeof(float));
      kernels_.gradients(share.slab, {&max_[t], &inverse_[t], &label_grad_[t]},
                         {blocks + share.number * block, &squares_[share.slab_number * lanes + t], d_part, scaled,
                          &scale_[t], results_.d_weight, results_.d_bias});
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
    const int64_t rows = padded_rows(width_), blocks = ceil_div(width_, kSumColumns);
    parallel_for(0, lanes / lanes_ * blocks, 1, [&](int64_t from, int64_t to) {
      std::vector<float> sum(kSumColumns * lanes_);
      for (int64_t i = from; i < to; ++i) {
        const int64_t first = i / blocks * lanes_, h = i % blocks * kSumColumns, n = std::min(kSumColumns, width_ - h);
        const float* part = d_parts + (i / blocks * rows + h) * lanes_;
        std::copy_n(part, n * lanes_, sum.begin());
        for (int64_t s = 1; s < slabs_; ++s) {
          part += rows * lanes;
          for (int64_t j = 0; j < n * lanes_; ++j) sum[j] += part[j];
        }
        for (int64_t t = first; t < std::min(first + lanes_, count); ++t) {
          float* row = results_.d_hidden + (begin + t) * width_ + h;
          for (int64_t j = 0; j < n; ++j) row[j] = sum[j * lanes_ + t - first];
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
  int64_t panels_, slabs_ = 1, groups_ = 1;  // panels of a whole chunk; parts of the vocabulary, and of the panels
  std::optional<Tensor> packed_, blocks_, scaled_, d_parts_;
  KeptBuffer logits_;
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
