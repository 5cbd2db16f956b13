// y = x w^T + bias with both in int8 and one scale for each row of either, on Hopper: see
// include/lowbit/int8_product.cuh.
#include "lowbit/int8_product.cuh"

#define ENTRY(name, type, columns)                                                                     \
  extern "C" __global__ void __launch_bounds__(lowbit::kProductThreads, 1)                              \
      linear_int8_##name##_##columns(const __grid_constant__ lowbit::ProductMaps maps,                  \
                                     const __grid_constant__ lowbit::ProductOperands o) {               \
    lowbit::Product<type, columns>(maps, o).run();                                                      \
  }
#define ENTRIES(name, type) \
  ENTRY(name, type, 256)    \
  ENTRY(name, type, 128)    \
  ENTRY(name, type, 64)
LOWBIT_FOR_EACH_DTYPE(ENTRIES)
#undef ENTRIES
#undef ENTRY
