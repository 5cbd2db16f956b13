// wgmma, the matrix instruction of compute capability 9.0: a group of four warps multiplies 64 x 16 numbers in registers with
// 16 x kTokens in shared memory, in the background.
#pragma once

#include "ptx.cuh"

namespace lowbit {

// Registers written before may be read by the products that follow.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` of the latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace lowbit

// The pass over the code of the host, which names kernels, has to find all of them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define LOWBIT_HAS_WGMMA 1

namespace lowbit {

// Who multiplies needs more registers than a thread has where all have the same number: the others leave them theirs. By
// all warps of a group of four.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What was written to shared memory before becomes visible to products that follow the next barrier.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler does not see when products write their sums: it must not move reads or writes of them over this place.
__device__ __forceinline__ void keep_in_registers(float (&d)[4]) {
  asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory");
}

// Operand B: rows of 128 bytes in groups of 8, their chunks swizzled, in-features side by side. The lower word has the
// address in units of 16 bytes, and may be counted up; the upper one is always the same.
__device__ __forceinline__ uint32_t describe_operand(uint32_t address) { return address >> 4 | 1 << 16; }
__device__ __forceinline__ uint64_t whole_descriptor(uint32_t lower) {
  constexpr uint32_t kGroupOf8 = 1024 >> 4, kSwizzle128 = 1u << 30;
  return static_cast<uint64_t>(kGroupOf8 | kSwizzle128) << 32 | lower;
}

// d += a b, of kTokens columns: a warp's rows are 16, and lanes hold of a and d what they do in `multiply_tile`.
template <typename T, int kTokens>
__device__ __forceinline__ void multiply_group(float (*d)[4], const uint32_t (&a)[4], uint64_t b);
// d = a b.
template <typename T, int kTokens>
__device__ __forceinline__ void multiply_first_group(float (*d)[4], const uint32_t (&a)[4], uint64_t b);

// Both, of so many columns: `adds` is "1" and `four` names registers that are read, too; or "0", and they are written alone.
#define LOWBIT_FOUR(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define LOWBIT_NEW_FOUR(d) "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
#define LOWBIT_MULTIPLY_32(T, name, function, four, adds) \
  template <> \
  __device__ __forceinline__ void function<T, 32>(float (*d)[4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." name "." name " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
                 "{%16, %17, %18, %19}, %20, " adds ", 1, 1, 0;" \
                 : four(d[0]), four(d[1]), four(d[2]), four(d[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
#define LOWBIT_MULTIPLY_64(T, name, function, four, adds) \
  template <> \
  __device__ __forceinline__ void function<T, 64>(float (*d)[4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
                 "{%32, %33, %34, %35}, %36, " adds ", 1, 1, 0;" \
                 : four(d[0]), four(d[1]), four(d[2]), four(d[3]), four(d[4]), four(d[5]), four(d[6]), four(d[7]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
#define LOWBIT_MULTIPLY_128(T, name) \
  template <> \
  __device__ __forceinline__ void multiply_group<T, 128>(float (*d)[4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " " \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;" \
                 : LOWBIT_FOUR(d[0]), LOWBIT_FOUR(d[1]), LOWBIT_FOUR(d[2]), LOWBIT_FOUR(d[3]), \
                   LOWBIT_FOUR(d[4]), LOWBIT_FOUR(d[5]), LOWBIT_FOUR(d[6]), LOWBIT_FOUR(d[7]), \
                   LOWBIT_FOUR(d[8]), LOWBIT_FOUR(d[9]), LOWBIT_FOUR(d[10]), LOWBIT_FOUR(d[11]), \
                   LOWBIT_FOUR(d[12]), LOWBIT_FOUR(d[13]), LOWBIT_FOUR(d[14]), LOWBIT_FOUR(d[15]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
#define LOWBIT_MULTIPLY(T, name) \
  LOWBIT_MULTIPLY_32(T, name, multiply_group, LOWBIT_FOUR, "1") \
  LOWBIT_MULTIPLY_32(T, name, multiply_first_group, LOWBIT_NEW_FOUR, "0") \
  LOWBIT_MULTIPLY_64(T, name, multiply_group, LOWBIT_FOUR, "1") \
  LOWBIT_MULTIPLY_64(T, name, multiply_first_group, LOWBIT_NEW_FOUR, "0") \
  LOWBIT_MULTIPLY_128(T, name)
LOWBIT_MULTIPLY(bfloat16, "bf16")
LOWBIT_MULTIPLY(float16, "f16")
#undef LOWBIT_MULTIPLY
#undef LOWBIT_MULTIPLY_32
#undef LOWBIT_MULTIPLY_64
#undef LOWBIT_MULTIPLY_128
#undef LOWBIT_FOUR
#undef LOWBIT_NEW_FOUR

// The tokens of a tile by the largest products that they are made of; `x` describes the first. With `kIsFirst`, d = a b.
template <typename T, int kTokens, bool kIsFirst>
__device__ __forceinline__ void multiply_tokens(float (*d)[4], const uint32_t (&a)[4], uint32_t x) {
  constexpr int kFirst = kTokens >= 128 && !kIsFirst ? 128 : kTokens >= 64 ? 64 : 32;
  if constexpr (kIsFirst) multiply_first_group<T, kFirst>(d, a, whole_descriptor(x));
  else multiply_group<T, kFirst>(d, a, whole_descriptor(x));
  if constexpr (kTokens > kFirst) {
    multiply_tokens<T, kTokens - kFirst, kIsFirst>(d + kFirst / 8, a, x + kFirst * 128 / 16);
  }
}

}  // namespace lowbit

#else

namespace lowbit {
__device__ __forceinline__ void publish_to_products() {}
}  // namespace lowbit

#endif
