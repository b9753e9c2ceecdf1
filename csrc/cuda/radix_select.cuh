// The highest keys of a run of memory, exactly, by one block: radix select from the highest bits down.
//
// Keys are unsigned integers that order as their numbers do (core/choice.h); a key of 0 is no candidate. Of equal keys
// the earlier come first. Counting is by integer atomics in shared memory, so that the result does not depend on their
// order.
#pragma once

#include <cstdint>

#include "cuda/block_sum.cuh"

namespace lead_fast {

// A run's highest keys are those above `key` and the first `ties` of those equal to it.
template <class Key>
struct Cut {
  Key key;
  uint32_t ties;
};

constexpr int kItems = 4;  // keys a thread loads at once

// The cut below the `count` highest of keys [size]; 1 <= count <= the number of candidates. Reads the keys once for
// every 11 of their bits, three times for 32 and six times for 64, all after a barrier, so that it sees what other
// threads of the block wrote before the call. Every thread of the block gets the cut.
template <int kThreads, class Key>
__device__ Cut<Key> find_cut(const Key* keys, int64_t size, uint32_t count) {
  constexpr int kDigit = 11, kBins = 1 << kDigit, kBinsPerThread = kBins / kThreads;
  static_assert(kBins % kThreads == 0);
  __shared__ uint32_t histogram[kBins];
  __shared__ uint32_t found_digit, found_place;

  Key prefix = 0, decided = 0;  // the bits of the key sought that are known, and which those are
  uint32_t place = count - 1;   // the place of the key sought among those with its prefix
  for (int high = 8 * sizeof(Key); high > 0;) {
    const int low = high > kDigit ? high - kDigit : 0;
    const Key digits = (Key{1} << (high - low)) - 1;
    for (int b = 0; b < kBinsPerThread; ++b) histogram[b * kThreads + threadIdx.x] = 0;
    __syncthreads();

    for (int64_t first = threadIdx.x; first < size; first += int64_t{kThreads} * kItems) {
      Key loaded[kItems];
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int64_t i = first + int64_t{item} * kThreads;
        loaded[item] = i < size ? keys[i] : 0;
      }
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const Key key = loaded[item];
        if (key != 0 && (key & decided) == prefix) atomicAdd(&histogram[(key >> low) & digits], 1u);
      }
    }
    __syncthreads();

    // The bin that holds the place; threads take the bins from the highest down.
    uint32_t in_bin[kBinsPerThread], mine = 0, all;
    const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
    for (int b = 0; b < kBinsPerThread; ++b) {
      in_bin[b] = histogram[highest - b];
      mine += in_bin[b];
    }
    uint32_t before = sum_before<kThreads>(mine, all);
    for (int b = 0; b < kBinsPerThread; ++b) {
      if (before <= place && place - before < in_bin[b]) {
        found_digit = static_cast<uint32_t>(highest - b);
        found_place = place - before;
      }
      before += in_bin[b];
    }
    __syncthreads();
    prefix |= Key{found_digit} << low;
    decided |= digits << low;
    place = found_place;
    high = low;
  }
  return {prefix, place + 1};
}

// Calls take(i, place) for each of the highest keys[i], in ascending i; `place` counts those before it from 0. `take`
// runs on one thread for each and may overwrite keys[i].
template <int kThreads, class Key, class Take>
__device__ void for_each_highest(const Key* keys, int64_t size, Cut<Key> cut, Take take) {
  static_assert(kThreads * kItems < 1 << 16, "two counts share a word");
  uint32_t above = 0, equal = 0;  // before the chunk
  for (int64_t chunk = 0; chunk < size; chunk += int64_t{kThreads} * kItems) {
    const int64_t first = chunk + int64_t{threadIdx.x} * kItems;
    Key loaded[kItems];
    uint32_t mine = 0, all;  // keys above the cut in the low half, equal to it in the high half
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const Key key = first + item < size ? keys[first + item] : 0;
      mine += key > cut.key ? 1u : key == cut.key ? 1u << 16 : 0u;
      loaded[item] = key;
    }
    const uint32_t before = sum_before<kThreads>(mine, all);
    uint32_t above_here = above + (before & 0xffffu), equal_here = equal + (before >> 16);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const uint32_t ties = equal_here < cut.ties ? equal_here : cut.ties;
      if (loaded[item] > cut.key) {
        take(first + item, above_here++ + ties);
      } else if (loaded[item] == cut.key) {
        if (equal_here < cut.ties) take(first + item, above_here + ties);
        ++equal_here;
      }
    }
    above += all & 0xffffu;
    equal += all >> 16;
  }
}

}  // namespace lead_fast
