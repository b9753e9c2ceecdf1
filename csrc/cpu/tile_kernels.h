// The fused loss in fp32, by tiles: what a thread does with its rows of the head, a "slab" of the vocabulary.
//
// Tokens are the vector lanes. A chunk of tokens is kept in panels, [panels, H, lanes] for the hidden states and
// [panels, V, lanes] for the logits, so that both products
//   a [v, t]  = sum_h W [v, h] hidden [h, t]
//   d [h, t] += sum_v W [v, h] (d nll / d a) [v, t]
// read the head as it lies in memory, one value for all lanes of a panel, and the softmax over the vocabulary needs no
// sum across lanes. What a product has just made is used while it is in the cache: each block of kSoftmaxRows logits
// has a softmax of its own, which leaves exp(z - the block's max) in the logits' place; these become blocks of
// kGradientRows gradients by one factor a block and token, and the second product reads them at once.
//
// One source (tile_kernels_impl.h) is compiled for each instruction set that gains by it.
#pragma once

#include <cstdint>

#include "cpu/row_kernels.h"

namespace lead_fast::cpu {

constexpr int64_t kMostTokens = 256;    // of a chunk: of 576 values each, they fill half of a 1 MiB L2
constexpr int64_t kMostDepth = 640;     // of a product's sums before they go to memory; no more tokens at once either
constexpr int64_t kSoftmaxRows = 96;    // of a block of logits
constexpr int64_t kGradientRows = 192;  // of a block of gradients: whole blocks of logits
constexpr int64_t kRowUnit = 24;        // the tiles of every instruction set divide it: a slab begins at a multiple

// Rows for which a panel has room.
constexpr int64_t padded_rows(int64_t rows) { return (rows + kRowUnit - 1) / kRowUnit * kRowUnit; }

// Rows [begin, end) of the head and a chunk's tokens: token t is lane t % lanes of panel t / lanes. The last panel's
// lanes beyond the chunk are tokens without a label.
struct Slab {
  int64_t begin, end, panels, width;  // width: H
  LogitMap map;
  const float* weight;   // [V, H]
  const float* hidden;   // [panels, padded_rows(H), lanes], zeros in the padding
  const int32_t* label;  // [panels * lanes], -1: none
  // [panels, padded_rows(end - begin), lanes]: exp(z - max of the block), 0 at a label; with a softcap, a instead.
  // Null: not kept.
  float* logits;
};

// Blocks of logits, [blocks, panels * lanes] each with rows of `stride` values.
struct SoftmaxBlocks {
  int64_t stride;
  float* max;     // of the logits but the label's; -inf where there is none
  float* others;  // their sum of exp(z - max)
  float* factor;  // exp(max - the token's max) / the token's sum: it turns exp(z - max) into p
};

// The whole softmax, [panels * lanes] each: p_v = exp(z_v - max) * inverse but at the label, p - 1 = label_grad there.
struct TokenSoftmax {
  float *label_logit, *max, *inverse, *label_grad;
};

// What a slab adds to; null where not asked for.
struct SlabGradients {
  float* block;         // [panels, kGradientRows, lanes]: its own, to work in
  double* squares;      // [panels * lanes]: sum of p_v^2 but the label's
  float* d_hidden;      // [panels, padded_rows(H), lanes]: this slab's own part
  const float* scaled;  // [H / lanes, rounded up; panels * lanes; lanes]: token_scale * hidden, see scaled_columns.h
  const float* scale;   // [panels * lanes]; a token of scale 0 adds nothing below, whatever its gradient is
  float* d_weight;      // [V, H]
  float* d_bias;        // [V]
};

struct TileKernels {
  int64_t lanes;
  // The logits of the slab's rows [from, to), whole blocks: blocks.max, blocks.others and the label_logit of tokens
  // whose label is among them. `scratch` [panels, kSoftmaxRows, lanes] has the logits where the slab keeps none.
  void (*logits)(const Slab& slab, int64_t from, int64_t to, const SoftmaxBlocks& blocks, float* label_logit,
                 float* scratch);
  // One panel's softmax from all its blocks, and blocks.factor; `count` lanes have tokens, whose losses go to `nll`.
  void (*softmax)(const SoftmaxBlocks& blocks, int64_t num_blocks, const int32_t* label, int64_t count,
                  const TokenSoftmax& tokens, float* nll);
  // d nll / d a of the slab's logits enters the gradients.
  void (*gradients)(const Slab& slab, const SoftmaxBlocks& blocks, const TokenSoftmax& tokens, const SlabGradients& to);
  // d_weight [rows, width] += the product of the first `rows` rows of `block` and `scaled`, both as in SlabGradients.
  void (*add_weight_grad)(const float* block, int64_t panels, int64_t rows, const float* scaled, const float* scale,
                          int64_t width, float* d_weight);
};

extern const TileKernels tile_kernels_avx512;
extern const TileKernels tile_kernels_avx2;

// Of the same instruction set as row_kernels(); null where that is the portable one, whose tiles torch's products
// outrun.
const TileKernels* tile_kernels();

}  // namespace lead_fast::cpu
