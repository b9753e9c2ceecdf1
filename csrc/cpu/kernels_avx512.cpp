// The row and tile kernels for AVX512.
#if defined(__x86_64__)
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "cpu/row_kernels.h"
#include "cpu/tile_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define LEAD_FAST_VECTOR_WIDTH 16
#define LEAD_FAST_ROW_KERNELS row_kernels_avx512
#define LEAD_FAST_TILE_KERNELS tile_kernels_avx512
#include "cpu/row_kernels_impl.h"
#include "cpu/tile_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
