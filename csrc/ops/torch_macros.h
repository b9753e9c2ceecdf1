// torch's check macros under the names that every release from 2.10 on understands.
#pragma once

#include <torch/csrc/stable/macros.h>  // STD_CUDA_CHECK
#include <torch/headeronly/util/shim_utils.h>

// 2.13 has a check of its own that keeps the message; before, this was its name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
