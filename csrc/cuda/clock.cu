// lead_fast::step and step_by_numbers for CUDA tensors; the schemas are in lead_fast/state.py, the references in
// lead_fast/reference_state.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "core/clock.h"
#include "cuda/launch.cuh"
#include "ops/state.h"
#include "ops/tensor_array.h"

namespace {

using torch::stable::Tensor;

// One thread: K additions that must come in order.
__global__ void step_kernel(lead_fast::Step args) {
  const int64_t s = args.counters[lead_fast::kNumSteps];
  lead_fast::trap_unless(0 <= s && s + 1 < args.clock_size, "step: `clock` has no entry after this step");
  for (int64_t i = 0; i < args.num_drawn; ++i) {
    lead_fast::trap_unless(args.arms[i] < args.num_arms, "step: `arms` must be below the number of arms");
  }
  lead_fast::advance_clock(args);
}

// All tensors on one CUDA device; no synchronisation.
void step(Tensor lr, Tensor num_items, Tensor arms, Tensor clock, Tensor counters, Tensor unit) {
  using lead_fast::array_of;
  const lead_fast::Step args = lead_fast::check_step(array_of(lr), array_of(num_items), array_of(arms), array_of(clock),
                                                     array_of(counters), array_of(unit));
  const lead_fast::Launcher launch(clock);
  launch(step_kernel, 1, 1, args);
}

// The numbers are arguments of the kernel: nothing else is launched to bring them.
void step_by_numbers(double lr, double num_items, Tensor arms, Tensor clock, Tensor counters, Tensor unit) {
  using lead_fast::array_of;
  const lead_fast::Step args = lead_fast::check_step_by_numbers(lr, num_items, array_of(arms), array_of(clock),
                                                                array_of(counters), array_of(unit));
  const lead_fast::Launcher launch(clock);
  launch(step_kernel, 1, 1, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) {
  library.impl("step", TORCH_BOX(&step));
  library.impl("step_by_numbers", TORCH_BOX(&step_by_numbers));
}
