// The instructions that C++ has no name for.
#pragma once

#include <cstdint>

#include "dtype.cuh"

namespace lowbit {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory in the background; writes zeros and reads nothing unless `is_inside`.
__device__ __forceinline__ void copy_16_async(uint32_t to, const void* from, bool is_inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_inside ? 16 : 0)
               : "memory");
}

// As `copy_16_async`; brings the 128 bytes around them into the L2 cache, for whoever goes on along a row.
__device__ __forceinline__ void copy_16_async_128(uint32_t to, const void* from, bool is_inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_inside ? 16 : 0)
               : "memory");
}

// As `copy_16_async`, 4 bytes.
__device__ __forceinline__ void copy_4_async(uint32_t to, const void* from, bool is_inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(is_inside ? 4 : 0) : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// As above, for 0 to 3 groups.
__device__ __forceinline__ void wait_for_copies_but(int pending) {
  if (pending == 0) wait_for_copies<0>();
  else if (pending == 1) wait_for_copies<1>();
  else if (pending == 2) wait_for_copies<2>();
  else wait_for_copies<3>();
}

// Lets the next kernel of the stream start, if it was launched as a dependent one. It sees nothing of this one's
// results before its own `wait_for_previous_kernel`.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns once all that the previous kernel of the stream wrote is visible. Does nothing in a launch that is not
// dependent.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Loads 16 bytes that nobody writes while the kernel runs, or zeros. In one piece, so that the address is made once.
__device__ __forceinline__ uint4 load_16_if(const void* from, bool is_inside) {
  uint4 value;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
      : "l"(from), "r"(static_cast<int>(is_inside)));
  return value;
}

// From an address in shared memory.
__device__ __forceinline__ uint32_t load_shared_4(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from));
  return value;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t from) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(from));
  return value;
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from));
  return value;
}

__device__ __forceinline__ void store_shared_4(uint32_t to, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared_8(uint32_t to, const uint2& value) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(value.x), "r"(value.y) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8, and gets two numbers of
// row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// The reverse, transposed: lane l gives the address of column l % 8 of matrix l / 8, and has two numbers of row l / 4 of each.
__device__ __forceinline__ void store_columns(uint32_t to, const uint32_t (&from)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t columns;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(from[i]));
    store_shared_4(__shfl_sync(0xffffffffu, to, i * 8 + lane / 4) + lane % 4 * 4, columns);
  }
#endif
}

// d = a b + c: a is 16 x 16, b 16 x 8, c and d are 16 x 8 in fp32. Lane 4 g + t holds of a, in pairs of columns, rows
// g, g + 8, g, g + 8; of b column g; of d columns 2 t and 2 t + 1 of rows g and g + 8.
template <typename T>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float c0,
                                              float c1, float c2, float c3);

#define LOWBIT_MULTIPLY_TILE(type, name)                                                                               \
  template <>                                                                                                          \
  __device__ __forceinline__ void multiply_tile<type>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, \
                                                      float c0, float c1, float c2, float c3) {                        \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                         \
        ".f32 "                                                                                                        \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                          \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));           \
  }
LOWBIT_MULTIPLY_TILE(bfloat16, "bf16")
LOWBIT_MULTIPLY_TILE(float16, "f16")
#undef LOWBIT_MULTIPLY_TILE

}  // namespace lowbit
