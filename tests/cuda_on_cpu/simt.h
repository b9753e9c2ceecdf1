// Runs CUDA kernels on the CPU, so that their source is tested where no card is: every thread of a block is a fiber
// that runs until it waits for others, at a barrier or in a warp's exchange.
//
// Blocks run one after another, so what a block may assume of another is not tested, nor is memory ordering. What is:
// the arithmetic, indexing, barriers that some threads never reach, and, by letting fibers run in another order,
// results that depend on the order of threads between two barriers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

struct Index {
  unsigned x = 0;
};

enum class Order { kAscending, kDescending, kShuffled };

inline Index thread_index, block_index, grid_size;
inline Order order = Order::kAscending;

constexpr int kWarp = 32;

class Block {
 public:
  // Runs `body` once for each of `threads` threads. Throws where a thread traps, or waits for one that does not come.
  static void run(int threads, const std::function<void()>& body) { block().run_threads(threads, body); }

  static void wait_for_block() { block().wait(State::kAtBarrier); }

  // The value that lane `source` of this warp passes.
  template <class T>
  static T exchange(T value, int source) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    Fiber& fiber = block().current();
    const int lane = static_cast<int>(thread_index.x) % kWarp;
    const std::size_t warp = thread_index.x / kWarp;
    const int turn = fiber.turn++ % 2;  // a lane may enter the next exchange while another still reads this one
    std::memcpy(&block().exchanges_[warp].word[turn][lane], &value, sizeof(T));
    block().wait(State::kInExchange);
    std::memcpy(&value, &block().exchanges_[warp].word[turn][source], sizeof(T));
    return value;
  }

  [[noreturn]] static void trap() {
    block().trapped_ = true;
    block().wait(State::kDone);
    std::abort();
  }

 private:
  enum class State { kReady, kAtBarrier, kInExchange, kDone };

  struct Fiber {
    ucontext_t start;
    jmp_buf place;  // where it waits
    std::unique_ptr<char[]> stack;
    State state;
    bool started;
    int turn;
  };

  struct Exchange {
    std::uint64_t word[2][kWarp];
  };

  static constexpr std::size_t kStackBytes = 64 << 10;

  static Block& block() {
    static Block block;
    return block;
  }

  Fiber& current() { return fibers_[thread_index.x]; }

  // Jumps, since contexts that are swapped save the signal mask by a call of the system each time.
  void wait(State state) {
    current().state = state;
    if (_setjmp(current().place) == 0) _longjmp(scheduler_, 1);
  }

  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  static void enter() {
    (*block().body_)();
    block().wait(State::kDone);
  }

  void run_threads(int threads, const std::function<void()>& body) {
    body_ = &body;
    trapped_ = false;
    if (fibers_.size() < static_cast<std::size_t>(threads)) fibers_.resize(threads);
    exchanges_.resize((threads + kWarp - 1) / kWarp);
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[t];
      if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.start);
      fiber.start.uc_stack = {fiber.stack.get(), 0, kStackBytes};
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, &Block::enter, 0);
      fiber.state = State::kReady;
      fiber.started = false;
      fiber.turn = 0;
    }
    do {
      for (const int warp : in_order((threads + kWarp - 1) / kWarp)) run_warp(warp, threads);
    } while (pass_barrier(threads));
  }

  // To the block's next barrier, so that warps get as far apart as they can.
  void run_warp(int warp, int threads) {
    const int begin = warp * kWarp, size = std::min(kWarp, threads - begin);
    do {
      for (const int lane : in_order(size)) {
        if (fibers_[begin + lane].state != State::kReady) continue;
        thread_index.x = static_cast<unsigned>(begin + lane);
        resume(current());
        if (trapped_) throw std::runtime_error("a kernel trapped");
      }
    } while (size == kWarp && all(begin, kWarp, State::kInExchange) && go_on(begin, kWarp));
  }

  // False when all threads are done.
  bool pass_barrier(int threads) {
    if (all(0, threads, State::kDone)) return false;
    if (!all(0, threads, State::kAtBarrier)) throw std::runtime_error("some threads wait for others that never come");
    return go_on(0, threads);
  }

  bool all(int begin, int size, State state) const {
    return std::all_of(fibers_.begin() + begin, fibers_.begin() + begin + size,
                       [&](const Fiber& fiber) { return fiber.state == state; });
  }

  bool go_on(int begin, int size) {
    for (int t = begin; t < begin + size; ++t) fibers_[t].state = State::kReady;
    return true;
  }

  // The numbers below `size`, in the order that warps or lanes are to run.
  std::vector<int> in_order(int size) {
    std::vector<int> numbers(size);
    std::iota(numbers.begin(), numbers.end(), 0);
    if (order == Order::kDescending) std::reverse(numbers.begin(), numbers.end());
    if (order == Order::kShuffled) std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  std::vector<Fiber> fibers_;
  std::vector<Exchange> exchanges_;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
  bool trapped_ = false;
  std::mt19937 random_{0};
};

}  // namespace simt
