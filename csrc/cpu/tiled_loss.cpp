// A chunk of tokens goes through the head twice, each thread with its own slab of the vocabulary:
//   logits of the slab and the softmax of its blocks; then the whole softmax, token by token;
//   gradients of the slab's logits, its part of d_hidden, its rows of d_weight; then the sum of the parts.
// One sweep is a chunk's gradients and then the next chunk's logits, so that a chunk has one long wait for the slowest
// thread, and who is early takes blocks of logits from the others. Where a frozen head's parts of d_hidden would
// outgrow the logits, there are fewer slabs, and threads share the tokens as well. Held are the logits of one chunk, in
// memory that the process keeps, and these parts. Results depend on the number of threads, as those of torch.mm do, and
// on nothing else: every sum has its place, whoever computes it.
#include "cpu/tiled_loss.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

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
constexpr int64_t kLogitRows = 4 * kSoftmaxRows;  // that a thread takes at once

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
    if (results.d_weight == nullptr && results.d_bias == nullptr) {  // else two groups would add to one row
      const int64_t small_rows = kSmallParts / (chunk_lanes() * int64_t{sizeof(float)});
      slabs_ = std::clamp<int64_t>(std::max(map.vocab, small_rows) / width, 1, slabs_);
      groups_ = std::clamp<int64_t>(threads / slabs_, 1, panels_);
    }
    slab_blocks_ = ceil_div(ceil_div(ceil_div(map.vocab, kRowUnit), slabs_) * kRowUnit, kSoftmaxRows);
    // A slab with fewer blocks than others leaves its last as they are here.
    block_max_.assign(slabs_ * slab_blocks_ * chunk_lanes(), -kInfinity);
    block_others_.assign(block_max_.size(), 0);
    block_factor_.resize(block_max_.size());
    for (std::vector<float>* of_tokens : {&label_logit_, &max_, &inverse_, &label_grad_, &scale_}) {
      of_tokens->resize(chunk_lanes());
    }
    squares_.resize(slabs_ * chunk_lanes());
  }

  void run(bool gradient) {
    Chunk chunks[2];
    const Chunk* last = nullptr;  // its softmax is known
    const int64_t count = ceil_div(tokens_.size(), chunk_lanes());
    reserve(blocks_, slabs_ * groups_ * block_size());
    if (gradient && results_.d_hidden != nullptr) reserve(d_parts_, slabs_ * padded_rows(width_) * chunk_lanes());
    logits_ = gradient ? kept_.emplace().reserve(chunk_lanes() * padded_rows(map_.vocab)) : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      Chunk& now = chunks[i % 2];
      pack(i * chunk_lanes(), now);
      sweep(last, &now);
      if (last != nullptr) finish_gradients(*last);
      finish_softmax(now);
      if (gradient) last = &now;
    }
    if (last == nullptr) return;
    sweep(last, nullptr);
    finish_gradients(*last);
  }

 private:
  struct Chunk {
    int64_t begin, count, panels;
    std::optional<Tensor> hidden;  // as in Slab
    std::vector<int32_t> label;
  };

  // A thread's part of a chunk: a slab for some panels, the first of which is that of `token`.
  struct Share {
    int64_t slab_number, token;
    Slab slab;
  };

  // Where a share is in a sweep.
  struct Progress {
    std::atomic<bool> logits_free{false};  // those of the chunk before are not needed any more
    std::atomic<int64_t> taken{0};         // steps of kLogitRows rows that have been handed out
  };

  int64_t chunk_lanes() const { return panels_ * lanes_; }

  int64_t block_size() const { return chunk_lanes() * kGradientRows; }

  // Of any chunk in the same memory, so that a share's logits only ever follow its own.
  Share share_of(const Chunk& chunk, int64_t number) const {
    const int64_t units = ceil_div(map_.vocab, kRowUnit), slab = number / groups_, group = number % groups_;
    const int64_t panel = std::min(group * panels_ / groups_, chunk.panels);
    const int64_t panels = std::min((group + 1) * panels_ / groups_, chunk.panels) - panel;
    const int64_t begin = slab * units / slabs_ * kRowUnit;
    const int64_t end = std::min((slab + 1) * units / slabs_ * kRowUnit, map_.vocab);
    const float* hidden = static_cast<const float*>(chunk.hidden->const_data_ptr());
    float* logits =
        logits_ == nullptr ? nullptr : logits_ + (begin * panels_ + panel * padded_rows(end - begin)) * lanes_;
    return {slab,
            panel * lanes_,
            {begin, end, panels, width_, map_, weight_, hidden + panel * padded_rows(width_) * lanes_,
             chunk.label.data() + panel * lanes_, logits}};
  }

  SoftmaxBlocks blocks_of(int64_t slab, int64_t token) {
    const int64_t at = slab * slab_blocks_ * chunk_lanes() + token;
    return {chunk_lanes(), &block_max_[at], &block_others_[at], &block_factor_[at]};
  }

  TokenSoftmax softmax_of(int64_t token) {
    return {&label_logit_[token], &max_[token], &inverse_[token], &label_grad_[token]};
  }

  float* block_of(int64_t number) { return static_cast<float*>(blocks_->mutable_data_ptr()) + number * block_size(); }

  void pack(int64_t begin, Chunk& chunk) {
    const int64_t count = std::min(chunk_lanes(), tokens_.size() - begin), rows = padded_rows(width_);
    chunk.begin = begin, chunk.count = count, chunk.panels = ceil_div(count, lanes_);
    float* packed = reserve(chunk.hidden, chunk_lanes() * rows);
    parallel_for(0, chunk.panels, 1, [&](int64_t from, int64_t to) {
      std::memset(packed + from * rows * lanes_, 0, (to - from) * rows * lanes_ * sizeof(float));
      for (int64_t t = from * lanes_; t < std::min(to * lanes_, count); ++t) {
        float* lane = packed + t / lanes_ * rows * lanes_ + t % lanes_;
        const float* row = hidden_ + (begin + t) * width_;
        for (int64_t h = 0; h < width_; ++h) lane[h * lanes_] = row[h];
      }
    });
    chunk.label.assign(chunk_lanes(), -1);
    for (int64_t t = 0; t < count; ++t) chunk.label[t] = static_cast<int32_t>(tokens_.label[begin + t]);
  }

  // The gradients of `last` and the logits of `now`; either may be null.
  void sweep(const Chunk* last, const Chunk* now) {
    const int64_t shares = slabs_ * groups_;
    std::vector<Progress> progress(shares);
    for (Progress& share : progress) share.logits_free = last == nullptr;
    parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
      for (int64_t number = from; number < to; ++number) {
        if (last != nullptr) gradients(share_of(*last, number), block_of(number));
        progress[number].logits_free.store(true, std::memory_order_release);
        for (int64_t i = 0; i < shares && now != nullptr; ++i) {
          const int64_t other = (number + i) % shares;
          // Not waited for: its thread may be this one.
          if (!progress[other].logits_free.load(std::memory_order_acquire)) continue;
          logits(share_of(*now, other), progress[other].taken, block_of(number));
        }
      }
    });
  }

  void logits(const Share& share, std::atomic<int64_t>& taken, float* scratch) {
    const Slab& slab = share.slab;
    while (slab.panels > 0) {
      const int64_t from = slab.begin + taken.fetch_add(1, std::memory_order_relaxed) * kLogitRows;
      if (from >= slab.end) return;
      kernels_.logits(slab, from, std::min(from + kLogitRows, slab.end), blocks_of(share.slab_number, share.token),
                      &label_logit_[share.token], scratch);
    }
  }

  void gradients(const Share& share, float* block) {
    if (share.slab.panels == 0) return;
    const int64_t t = share.token, columns = padded_rows(width_) * lanes_;
    float* d_part = nullptr;
    if (results_.d_hidden != nullptr) {
      d_part = static_cast<float*>(d_parts_->mutable_data_ptr());
      d_part += share.slab_number * panels_ * columns + t / lanes_ * columns;
      std::memset(d_part, 0, share.slab.panels * columns * sizeof(float));
    }
    double* squares = &squares_[share.slab_number * chunk_lanes() + t];
    std::fill_n(squares, share.slab.panels * lanes_, 0);
    kernels_.gradients(share.slab, blocks_of(share.slab_number, t), softmax_of(t),
                       {block, squares, d_part, scaled_rows_, &scale_[t], results_.d_weight, results_.d_bias});
  }

  void finish_softmax(const Chunk& chunk) {
    parallel_for(0, chunk.panels, 1, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t t = panel * lanes_;
        kernels_.softmax(blocks_of(0, t), slabs_ * slab_blocks_, &chunk.label[t], std::min(lanes_, chunk.count - t),
                         softmax_of(t), &results_.nll[chunk.begin + t]);
      }
    });
    std::fill(scale_.begin(), scale_.end(), 0);
    std::copy_n(&tokens_.scale[chunk.begin], chunk.count, scale_.begin());
    if (results_.d_weight != nullptr) scaled_rows_ = scale_rows(chunk.begin, chunk.count, chunk.panels * lanes_);
  }

  void finish_gradients(const Chunk& chunk) {
    for (int64_t t = 0; t < chunk.count; ++t) {
      double squares = double(label_grad_[t]) * label_grad_[t];
      for (int64_t slab = 0; slab < slabs_; ++slab) squares += squares_[slab * chunk_lanes() + t];
      results_.logit_grad_sq[chunk.begin + t] = float(squares);
    }
    if (results_.d_hidden == nullptr) return;
    sum_parts(static_cast<float*>(d_parts_->mutable_data_ptr()), chunk.begin, chunk.count, chunk.panels);
  }

  const float* scale_rows(int64_t begin, int64_t count, int64_t lanes) {
    float* scaled = reserve(scaled_, ceil_div(width_, lanes_) * lanes_ * lanes);
    scaled_columns(hidden_ + begin * width_, scale_.data(), count, width_, lanes, lanes_, row_kernels().f32, scaled);
    return scaled;
  }

  void sum_parts(const float* d_parts, int64_t begin, int64_t count, int64_t panels) {
    const int64_t rows = padded_rows(width_), blocks = ceil_div(width_, kSumColumns);
    parallel_for(0, panels * blocks, 1, [&](int64_t from, int64_t to) {
      std::vector<float> sum(kSumColumns * lanes_);
      for (int64_t i = from; i < to; ++i) {
        const int64_t first = i / blocks * lanes_, h = i % blocks * kSumColumns, n = std::min(kSumColumns, width_ - h);
        const float* part = d_parts + (i / blocks * rows + h) * lanes_;
        std::copy_n(part, n * lanes_, sum.begin());
        for (int64_t s = 1; s < slabs_; ++s) {
          part += rows * chunk_lanes();
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
  // Panels of a whole chunk; parts of the vocabulary, and of the panels; blocks of logits in the largest slab.
  int64_t panels_, slabs_ = 1, groups_ = 1, slab_blocks_;
  std::optional<Tensor> blocks_, scaled_, d_parts_;
  std::optional<KeptBuffer> kept_;
  float* logits_ = nullptr;
  const float* scaled_rows_ = nullptr;
  std::vector<float> block_max_, block_others_, block_factor_;  // see blocks_of
  std::vector<float> label_logit_, max_, inverse_, label_grad_, scale_;
  std::vector<double> squares_;  // [slabs, lanes of a chunk]
};

}  // namespace

void tiled_loss(const float* hidden, const float* weight, int64_t width, const LogitMap& map,
                const SupervisedTokens& tokens, const TileKernels& kernels, bool gradient,
                LossResults<float>& results) {
  TiledLoss(hidden, weight, width, map, tokens, kernels, results).run(gradient);
}

}  // namespace lead_fast::cpu
