// Supervised tokens go through in chunks:
//   a = h W^T              product, [rows, V]; in bf16 with the bias
//   a <- d nll / d a       row_kernels.h, in place
//   d = a W                product
//   dW += a^T (scale * h)  in fp32, only with a trained head
// The logits of one chunk are all that is ever held.
#include "cpu/product_loss.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/matmul.h"
#include "cpu/scaled_columns.h"
#include "cpu/tile_kernels.h"

namespace lead_fast::cpu {

namespace {

using torch::stable::parallel_for;

constexpr int64_t kMostChunkRows = 512;
static_assert(kMostChunkRows + 31 <= kMostDepth, "the weight gradient by tiles takes all of a chunk's tokens at once");

// Logits of 24 MiB stay in a server's last-level cache and in memory that malloc keeps; where that would be fewer than
// 128 rows, too few for a product that reads all of W, 192 rows go through main memory. Measured on Zen 5.
int64_t chunk_rows(int64_t vocab, int64_t bytes) {
  const int64_t rows = (int64_t{24} << 20) / (vocab * bytes) / 16 * 16;
  return rows < 128 ? 192 : std::min<int64_t>(rows, kMostChunkRows);
}

template <class Stored>
class ProductLoss {
 public:
  ProductLoss(Stored* hidden, Stored* weight, Stored* bias, int64_t width, const LogitMap& map,
              const SupervisedTokens& tokens, const StoredRows<Stored>& rows, LossResults<Stored>& results)
      : hidden_(hidden),
        bias_(bias),
        width_(width),
        map_(map),
        tokens_(tokens),
        rows_(rows),
        results_(results),
        weight_{weight, kDtype, map.vocab, width, width} {}

  void run(bool gradient) {
    const int64_t step = chunk_rows(map_.vocab, sizeof(Stored));
    for (int64_t begin = 0; begin < tokens_.size(); begin += step) {
      const int64_t end = std::min(begin + step, tokens_.size());
      const Matrix h = {hidden_ + begin * width_, kDtype, end - begin, width_, width_};
      const Matrix bias = {bias_, kDtype, h.rows, map_.vocab, 0};
      const Matrix a = {reserve_bytes(logits_, h.rows * map_.vocab * sizeof(Stored)), kDtype, h.rows, map_.vocab,
                        map_.vocab};
      multiply(h, weight_.t(), a, bias_ == nullptr ? nullptr : &bias);
      loss_and_gradient(a, begin, gradient);
      if (results_.d_hidden != nullptr) {
        multiply(a, weight_, {results_.d_hidden + begin * width_, kDtype, h.rows, width_, width_});
      }
      if (results_.d_bias != nullptr) add_bias_grad(a, begin);
      if (results_.d_weight == nullptr) continue;
      if (tile_kernels() != nullptr) {
        add_weight_grad_by_tiles(*tile_kernels(), a, begin);
      } else {
        add_weight_grad_by_torch(a, h, begin);
      }
    }
  }

 private:
  static constexpr ScalarType kDtype = std::is_same_v<Stored, float> ? ScalarType::Float : ScalarType::BFloat16;

  Stored* row(const Matrix& a, int64_t r) const { return static_cast<Stored*>(a.data) + r * a.row_stride; }

  void loss_and_gradient(const Matrix& a, int64_t first, bool gradient) {
    parallel_for(0, a.rows, grain(map_.vocab), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t label = tokens_.label[first + r];
        // All bits set is a NaN in fp32 and in bf16: one makes the loss and the whole gradient of its row NaN.
        if (label < 0) std::memset(row(a, r), 0xff, sizeof(Stored));
        const auto loss = rows_.loss(row(a, r), std::max<int64_t>(label, 0), map_, gradient);
        results_.nll[first + r] = loss.nll;
        results_.logit_grad_sq[first + r] = loss.logit_grad_sq;
      }
    });
  }

  void add_bias_grad(const Matrix& a, int64_t first) {
    parallel_for(0, map_.vocab, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t r = 0; r < a.rows; ++r) {
        const float scale = tokens_.scale[first + r];
        if (scale != 0) rows_.add(row(a, r) + begin, scale, results_.d_bias + begin, end - begin);
      }
    });
  }

  // The scales go to h, which is smaller than `a`. In fp32 also for bf16, whose products torch would round before they
  // are summed.
  void add_weight_grad_by_tiles(const TileKernels& tiles, const Matrix& a, int64_t first) {
    const int64_t panels = (a.rows + tiles.lanes - 1) / tiles.lanes, lanes = panels * tiles.lanes;
    std::vector<float> scale(lanes);
    std::copy_n(&tokens_.scale[first], a.rows, scale.begin());
    float* scaled = reserve(scaled_, (width_ + tiles.lanes - 1) / tiles.lanes * tiles.lanes * lanes);
    scaled_columns(hidden_ + first * width_, scale.data(), a.rows, width_, lanes, tiles.lanes, rows_, scaled);
    parallel_for(0, (map_.vocab + kGradientRows - 1) / kGradientRows, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> block(kGradientRows * lanes), piece(kGradientRows);
      for (int64_t v = begin * kGradientRows; v < std::min(end * kGradientRows, map_.vocab); v += kGradientRows) {
        const int64_t count = std::min(kGradientRows, map_.vocab - v);
        for (int64_t t = 0; t < a.rows; ++t) {
          rows_.scale_to_f32(row(a, t) + v, 1, piece.data(), count);
          float* lane = &block[t / tiles.lanes * kGradientRows * tiles.lanes + t % tiles.lanes];
          for (int64_t i = 0; i < count; ++i) lane[i * tiles.lanes] = piece[i];
        }
        tiles.add_weight_grad(block.data(), panels, count, scaled, scale.data(), width_,
                              results_.d_weight + v * width_);
      }
    });
  }

  // A row of scale 0 is cleared on both sides, since 0 * NaN is NaN: `a` is not needed any more. bf16 is converted by
  // column tiles that stay in the cache.
  void add_weight_grad_by_torch(const Matrix& a, const Matrix& h, int64_t first) {
    constexpr int64_t tile = 4096;
    float* scaled_rows = reserve(scaled_, a.rows * width_);
    const Matrix scaled = {scaled_rows, ScalarType::Float, a.rows, width_, width_};
    for (int64_t r = 0; r < a.rows; ++r) {
      rows_.scale_to_f32(row(h, r), tokens_.scale[first + r], scaled_rows + r * width_, width_);
      if (tokens_.scale[first + r] == 0) std::memset(row(a, r), 0, map_.vocab * sizeof(Stored));
    }
    if (kDtype == ScalarType::Float) return multiply_add(a.t(), scaled, weight_grad_rows(0, map_.vocab));
    float* column_rows = reserve(columns_, a.rows * std::min(tile, map_.vocab));
    for (int64_t v = 0; v < map_.vocab; v += tile) {
      const int64_t cols = std::min(tile, map_.vocab - v);
      parallel_for(0, a.rows, grain(cols), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) rows_.scale_to_f32(row(a, r) + v, 1, column_rows + r * cols, cols);
      });
      const Matrix columns = {column_rows, ScalarType::Float, a.rows, cols, cols};
      multiply_add(columns.t(), scaled, weight_grad_rows(v, cols));
    }
  }

  Matrix weight_grad_rows(int64_t v, int64_t rows) const {
    return {results_.d_weight + v * width_, ScalarType::Float, rows, width_, width_};
  }

  Stored* hidden_;
  Stored* bias_;
  int64_t width_;
  LogitMap map_;
  const SupervisedTokens& tokens_;
  const StoredRows<Stored>& rows_;
  LossResults<Stored>& results_;
  Matrix weight_;
  std::optional<Tensor> logits_, scaled_, columns_;
};

}  // namespace

template <class Stored>
void product_loss(Stored* hidden, Stored* weight, Stored* bias, int64_t width, const LogitMap& map,
                  const SupervisedTokens& tokens, const StoredRows<Stored>& rows, bool gradient,
                  LossResults<Stored>& results) {
  ProductLoss<Stored>(hidden, weight, bias, width, map, tokens, rows, results).run(gradient);
}

template void product_loss(float*, float*, float*, int64_t, const LogitMap&, const SupervisedTokens&,
                           const StoredRows<float>&, bool, LossResults<float>&);
template void product_loss(uint16_t*, uint16_t*, uint16_t*, int64_t, const LogitMap&, const SupervisedTokens&,
                           const StoredRows<uint16_t>&, bool, LossResults<uint16_t>&);

}  // namespace lead_fast::cpu
