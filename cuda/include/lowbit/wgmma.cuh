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

// d += a b, or with `kIsFirst` d = a b, of kTokens columns: a warp's rows are 16, and lanes hold of a and d what they do in
// `multiply_tile`.
template <typename T, int kTokens, bool kIsFirst>
__device__ __forceinline__ void multiply_tokens(float (*d)[4], const uint32_t (&a)[4], uint64_t b);

// Sums as operands, which are read, too ("+"), or written alone ("="), and their names: 32 columns have 16.
#define LOWBIT_FOUR(access, d) access "f"(d[0]), access "f"(d[1]), access "f"(d[2]), access "f"(d[3])
#define LOWBIT_SUMS_32(access, d) \
  LOWBIT_FOUR(access, (d)[0]), LOWBIT_FOUR(access, (d)[1]), LOWBIT_FOUR(access, (d)[2]), LOWBIT_FOUR(access, (d)[3])
#define LOWBIT_SUMS_64(access, d) LOWBIT_SUMS_32(access, d), LOWBIT_SUMS_32(access, d + 4)
#define LOWBIT_SUMS_96(access, d) LOWBIT_SUMS_64(access, d), LOWBIT_SUMS_32(access, d + 8)
#define LOWBIT_SUMS_128(access, d) LOWBIT_SUMS_64(access, d), LOWBIT_SUMS_64(access, d + 8)
#define LOWBIT_SUMS_192(access, d) LOWBIT_SUMS_128(access, d), LOWBIT_SUMS_64(access, d + 16)
#define LOWBIT_SUMS_256(access, d) LOWBIT_SUMS_128(access, d), LOWBIT_SUMS_128(access, d + 16)
#define LOWBIT_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LOWBIT_NAMES_64 LOWBIT_NAMES_32 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOWBIT_NAMES_96 LOWBIT_NAMES_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LOWBIT_NAMES_128 LOWBIT_NAMES_96 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LOWBIT_NAMES_192 LOWBIT_NAMES_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LOWBIT_NAMES_256 LOWBIT_NAMES_192 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// `a_names` and `b_name` are of the operands behind the sums.
#define LOWBIT_PRODUCT(T, name, tokens, is_first, access, adds, a_names, b_name) \
  template <> \
  __device__ __forceinline__ void multiply_tokens<T, tokens, is_first>(float (*d)[4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." name "." name " " \
                 "{" LOWBIT_NAMES_##tokens "}, {" a_names "}, " b_name ", " adds ", 1, 1, 0;" \
                 : LOWBIT_SUMS_##tokens(access, d) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
#define LOWBIT_PRODUCTS(T, name, tokens, a_names, b_name) \
  LOWBIT_PRODUCT(T, name, tokens, false, "+", "1", a_names, b_name) \
  LOWBIT_PRODUCT(T, name, tokens, true, "=", "0", a_names, b_name)
#define LOWBIT_PRODUCTS_OF(T, name) \
  LOWBIT_PRODUCTS(T, name, 32, "%16, %17, %18, %19", "%20") \
  LOWBIT_PRODUCTS(T, name, 64, "%32, %33, %34, %35", "%36") \
  LOWBIT_PRODUCTS(T, name, 96, "%48, %49, %50, %51", "%52") \
  LOWBIT_PRODUCTS(T, name, 128, "%64, %65, %66, %67", "%68") \
  LOWBIT_PRODUCTS(T, name, 192, "%96, %97, %98, %99", "%100") \
  LOWBIT_PRODUCTS(T, name, 256, "%128, %129, %130, %131", "%132")
LOWBIT_PRODUCTS_OF(bfloat16, "bf16")
LOWBIT_PRODUCTS_OF(float16, "f16")
#undef LOWBIT_PRODUCTS_OF
#undef LOWBIT_PRODUCTS
#undef LOWBIT_PRODUCT
#undef LOWBIT_NAMES_32
#undef LOWBIT_SUMS_32
#undef LOWBIT_NAMES_64
#undef LOWBIT_SUMS_64
#undef LOWBIT_NAMES_96
#undef LOWBIT_SUMS_96
#undef LOWBIT_NAMES_128
#undef LOWBIT_SUMS_128
#undef LOWBIT_NAMES_192
#undef LOWBIT_SUMS_192
#undef LOWBIT_NAMES_256
#undef LOWBIT_SUMS_256
#undef LOWBIT_FOUR

}  // namespace lowbit

#else

namespace lowbit {
__device__ __forceinline__ void publish_to_products() {}
}  // namespace lowbit

#endif
