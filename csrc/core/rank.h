// The rows chosen in each task of an arm: exact, deterministic, the same for any number of threads.
//
//   pass 1, over two flags a row: how many rows of each task are available, and so how many it gives
//   pass 2, task by task: utility -> 32-bit keys, random words where the choice has noise, then those that rank first
//
// A row costs 18 bytes read from the table (loss, previous utility, proxy, index, two flags); the keys of a task stay
// in the cache.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/choice.h"
#include "core/philox.h"
#include "core/rank_keys.h"
#include "core/rank_loops.h"
#include "core/top.h"

namespace lead_fast {

// One task of the drawn arm.
struct Task {
  std::int64_t begin, end;                 // positions
  std::int64_t available = 0, tokens = 0;  // rows that may be chosen, and the tokens they have where a budget asks
  std::int64_t excluded = 0, chosen = 0;
  std::int64_t first = 0;  // where its chosen rows start in the output
};

inline ArmRows rows_of_arm(const Rank& args, std::int64_t arm) {
  const std::int64_t n = args.num_rows;
  return {table_row(args.values, kLoss, n),
          table_row(args.values, kPrevious, n),
          table_row(args.values, kProxy, n),
          table_row(args.seen, args.by_round ? kRound : kStep, n),
          table_row(args.flags, kUses, n),
          table_row(args.flags, kQuarantined, n),
          args.rows,
          args.utility,
          args.coefficients.of_arm(arm),
          Smoothing(args.smoothing),
          static_cast<int>(std::clamp<std::int64_t>(args.max_uses, 0, 256))};
}

inline std::vector<Task> tasks_of_arm(const Rank& args, std::int64_t arm) {
  std::vector<Task> tasks;
  const std::int64_t first = args.arm_groups[arm], last = args.arm_groups[arm + 1];
  if (first < 0 || last < first || last > args.num_groups) {
    throw std::invalid_argument("rank: `arm_groups` must ascend within [0, " + std::to_string(args.num_groups) +
                                "], got " + std::to_string(first) + ", " + std::to_string(last));
  }
  for (std::int64_t j = first; j < last; ++j) {
    const std::int64_t begin = args.group_offsets[j], end = args.group_offsets[j + 1];
    if (begin < 0 || end < begin || end > args.num_rows) {
      throw std::invalid_argument("rank: `group_offsets` must ascend within [0, " + std::to_string(args.num_rows) +
                                  "], got " + std::to_string(begin) + ", " + std::to_string(end));
    }
    tasks.push_back({begin, end});
  }
  return tasks;
}

inline bool has_token_budget(const Rank& args) { return args.num_tokens != nullptr && args.token_budget > 0.0; }

// How many rows each task gives, and which ranks of utility they start at.
inline void set_quotas(const Rank& args, std::int64_t arm, std::vector<Task>& tasks) {
  double rate = args.rate;
  std::int64_t cap = args.cap;
  if (has_token_budget(args)) {
    std::int64_t tokens = 0, available = 0;
    for (const Task& task : tasks) {
      tokens += task.tokens;
      available += task.available;
    }
    rate = 1.0;
    cap = cap_for_tokens(cap, args.token_budget, tokens, available);
  }

  std::int64_t total = 0;
  for (Task& task : tasks) {
    task.excluded = excluded_rows(args.exclude_top, task.available);
    task.chosen = wanted_rows(rate, task.available);
    total += task.chosen;
  }
  if (cap >= 0 && total > cap) {
    const double uniform = philox_uniform(args.seed, kStreamTasks, args.round, static_cast<std::uint64_t>(arm));
    std::int64_t wanted = 0, edge = 0;
    for (Task& task : tasks) {
      wanted += task.chosen;
      const std::int64_t next = &task == &tasks.back() ? cap : thinned_edge(wanted, cap, total, uniform);
      task.chosen = next - edge;
      edge = next;
    }
  }
  std::int64_t first = 0;
  for (Task& task : tasks) {
    task.chosen = std::max<std::int64_t>(std::min(task.chosen, task.available - task.excluded), 0);
    task.first = first;
    first += task.chosen;
  }
  if (first > args.capacity) {
    throw std::invalid_argument("rank: `capacity` must be at least the " + std::to_string(first) +
                                " rows chosen, got " + std::to_string(args.capacity));
  }
}

// A row that is chosen, or may be.
struct Candidate {
  std::int64_t place;  // in its task
  float utility;
  std::uint64_t key;  // what a choice with noise goes by
};

// A thread's buffers for tasks of up to `size` rows, in one block: malloc keeps one of a size it has seen, and gives
// several back to the system after every call.
class RankScratch {
 public:
  explicit RankScratch(std::int64_t size) : block_(new std::uint32_t[6 * (size + kRankVector)]) {
    std::uint32_t* at = block_.get();
    for (std::uint32_t** buffer : {&keys, &words, &upper, &lower, &found.keys, &found.places}) {
      *buffer = at;
      at += size + kRankVector;
    }
    among_found.keys = upper;
    among_found.places = lower;
  }

  std::uint32_t *keys, *words, *upper, *lower;
  Found found{};
  Found among_found{};  // for choices without bounds
  std::vector<Candidate> candidates;

 private:
  std::unique_ptr<std::uint32_t[]> block_;
};

// Keys of a task's rows, and random words where the choice has noise.
inline void read_task(const Rank& args, const ArmRows& rows, const Task& task, RankScratch& scratch) {
  rank_loops().utility_keys(rows, task.begin, task.end, scratch.keys);
  if (args.choose == kTopk) return;
  rank_loops().random_words(rows, args.seed, args.round, task.begin, task.end, scratch.words);
}

// By utility: the ranks behind those left out.
inline void choose_by_utility(const ArmRows& rows, const Task& task, RankScratch& scratch) {
  const std::int64_t n = task.end - task.begin, last = task.excluded + task.chosen;
  Found& found = scratch.found;
  find_ranks(scratch.keys, n, task.excluded + 1, last, found);
  const auto among = [&](std::int64_t rank) {
    return Taken(top(found.keys, found.size, found.size, rank - found.above, scratch.among_found));
  };
  Taken excluded = among(task.excluded), taken = among(last);
  for (std::int64_t i = 0; i < found.size; ++i) {
    const std::uint32_t key = found.keys[i];
    const bool is_taken = taken(key), is_excluded = excluded(key);  // both count their ties
    if (is_taken && !is_excluded) {
      scratch.candidates.push_back({found.places[i], key_value(key), 0});
      __builtin_prefetch(rows.rows + task.begin + found.places[i]);
    }
  }
}

// Takes the rows of highest utility out of the choice: their keys become 0.
inline void exclude(const Task& task, RankScratch& scratch) {
  const std::int64_t n = task.end - task.begin;
  Taken excluded(top(scratch.keys, n, task.available, task.excluded, scratch.found));
  for (std::int64_t i = 0; i < n; ++i) scratch.keys[i] = excluded(scratch.keys[i]) ? 0 : scratch.keys[i];
}

// What a choice with noise goes by, as an integer that orders like it.
inline std::uint64_t exact_key(const Rank& args, float utility, std::uint32_t word) {
  if (args.choose == kRandom) return word;
  return order_key(static_cast<double>(utility) / args.temperature + gumbel(uniform_of_word(word)));
}

// With noise: bounds rule out nearly all rows, and the rest is ranked by exact keys.
inline void choose_with_noise(const Rank& args, const Task& task, RankScratch& scratch) {
  const std::int64_t n = task.end - task.begin;
  if (task.excluded > 0) exclude(task, scratch);
  if (args.choose == kSoftmax) {
    rank_loops().softmax_bounds(args.temperature, scratch.keys, scratch.words, n, scratch.upper, scratch.lower);
  } else {
    for (std::int64_t i = 0; i < n; ++i) {
      scratch.lower[i] = scratch.upper[i] = scratch.keys[i] == 0 ? 0 : std::max(scratch.words[i], 1u);
    }
  }

  // As many rows as are chosen reach this lower bound: a row whose upper bound does not is out.
  const Threshold least = top(scratch.lower, n, task.available - task.excluded, task.chosen, scratch.found);
  const Window window{least.key, 0xFFFFFFFFu};
  collect(scratch.upper, n, window, scratch.found);
  for (std::int64_t i = 0; i < scratch.found.size; ++i) {
    const std::int64_t place = scratch.found.places[i];
    const float utility = key_value(scratch.keys[place]);
    scratch.candidates.push_back({place, utility, exact_key(args, utility, scratch.words[place])});
  }
  const auto end = scratch.candidates.begin() + task.chosen;
  std::nth_element(
      scratch.candidates.begin(), end - 1, scratch.candidates.end(),
      [](const Candidate& a, const Candidate& b) { return a.key != b.key ? a.key > b.key : a.place < b.place; });
  scratch.candidates.erase(end, scratch.candidates.end());
  std::sort(scratch.candidates.begin(), end, [](const Candidate& a, const Candidate& b) { return a.place < b.place; });
}

// Pass 1.
template <class Parallel>
void count_rows(const Rank& args, const ArmRows& rows, const Parallel& parallel, std::vector<Task>& tasks) {
  std::vector<std::atomic<std::int64_t>> available(tasks.size()), tokens(tasks.size());
  constexpr std::int64_t grain = 65536;
  parallel(tasks.front().begin, tasks.back().end, grain, [&](std::int64_t begin, std::int64_t end) {
    auto task = std::upper_bound(tasks.begin(), tasks.end(), begin,
                                 [](std::int64_t p, const Task& other) { return p < other.end; });
    for (; task != tasks.end() && task->begin < end; ++task) {
      const std::int64_t from = std::max(begin, task->begin), to = std::min(end, task->end);
      available[task - tasks.begin()] += rank_loops().count_available(rows, from, to);
      if (!has_token_budget(args)) continue;
      std::int64_t sum = 0;
      for (std::int64_t p = from; p < to; ++p) sum += rows.available(p) ? args.num_tokens[p] : 0;
      tokens[task - tasks.begin()] += sum;
    }
  });
  for (std::size_t j = 0; j < tasks.size(); ++j) {
    tasks[j].available = available[j];
    tasks[j].tokens = tokens[j];
  }
}

// Chooses; `parallel` is called as parallel(begin, end, grain, body).
template <class Parallel>
void rank(const Rank& args, const Parallel& parallel, const Chosen& out) {
  std::fill(out.rows, out.rows + args.capacity, -1);
  std::fill(out.utility, out.utility + args.capacity, 0.0f);
  std::fill(out.uses, out.uses + args.capacity, std::uint8_t{0});
  const std::int64_t arm = *args.arm_drawn;
  if (arm < -1 || arm >= args.num_arms) {
    throw std::invalid_argument("rank: `arm_drawn` must be in [-1, " + std::to_string(args.num_arms) + "), got " +
                                std::to_string(arm));
  }
  if (arm < 0) return;
  std::vector<Task> tasks = tasks_of_arm(args, arm);
  if (tasks.empty()) return;

  const ArmRows rows = rows_of_arm(args, arm);
  count_rows(args, rows, parallel, tasks);
  set_quotas(args, arm, tasks);

  // Pass 2, in parts of equal numbers of rows: a task belongs to the part that it begins in.
  constexpr std::int64_t grain = 16384;
  parallel(tasks.front().begin, tasks.back().end, grain, [&](std::int64_t begin, std::int64_t end) {
    auto task = std::lower_bound(tasks.begin(), tasks.end(), begin,
                                 [](const Task& other, std::int64_t p) { return other.begin < p; });
    std::int64_t longest = 0;
    for (auto other = task; other != tasks.end() && other->begin < end; ++other) {
      longest = std::max(longest, other->end - other->begin);
    }
    RankScratch scratch(longest);
    for (; task != tasks.end() && task->begin < end; ++task) {
      if (task->chosen == 0) continue;
      read_task(args, rows, *task, scratch);
      scratch.candidates.clear();
      if (args.choose == kTopk) {
        choose_by_utility(rows, *task, scratch);
      } else {
        choose_with_noise(args, *task, scratch);
      }
      std::int64_t at = task->first;
      for (const Candidate& chosen : scratch.candidates) {
        const std::int64_t p = task->begin + chosen.place;
        out.rows[at] = rows.rows[p];
        out.utility[at] = chosen.utility;
        out.uses[at++] = rows.uses[p];
      }
    }
  });
}

}  // namespace lead_fast
