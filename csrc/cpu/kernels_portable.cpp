// The row kernels for any CPU: vectors of four, which SSE2 and NEON have and other machines emulate.
#define LEAD_FAST_VECTOR_WIDTH 4
#define LEAD_FAST_ROW_KERNELS row_kernels_portable
#include "cpu/row_kernels_impl.h"
