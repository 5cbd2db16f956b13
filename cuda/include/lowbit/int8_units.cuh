// What products of int8 ask of Hopper beside wgmma.cuh, mbarrier.cuh and tensor_map.cuh: barriers that copies arrive at,
// products of int8. PTX ISA: wgmma, mbarrier.
#pragma once

#include <cstdint>

#include "mbarrier.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace lowbit {

// ---- barriers that copies arrive at

// Makes initialized barriers visible to copies.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase with this parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- products of a warp group: d[64 x kN] += a[64 x 32 bytes] b[kN x 32 bytes]^T, both in shared memory

// Operands whose rows are of 128 or 64 bytes, swizzled by as much (PTX ISA: matrix descriptor). 8 rows follow each
// other.
__device__ __forceinline__ uint64_t operand_of_128(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}
__device__ __forceinline__ uint64_t operand_of_64(uint32_t address) {
  return uint64_t{2} << 62 | uint64_t{512 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// Of int8 into int32, or of 16-bit floats into fp32, whose bits then stand in the same registers: so that sums of one
// kind can become sums of the other in place.
template <int kN>
struct Products;

#define LOWBIT_NAMES_0                                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31"
#define LOWBIT_NAMES_1                                                                                                 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
  "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LOWBIT_NAMES_2                                                                                                 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LOWBIT_NAMES_3                                                                                                 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, " \
  "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LOWBIT_8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define LOWBIT_32(c, i) LOWBIT_8(c, i), LOWBIT_8(c, i + 8), LOWBIT_8(c, i + 16), LOWBIT_8(c, i + 24)

#define LOWBIT_PRODUCTS(kN, names, registers, a, b, adds)                                                              \
  template <>                                                                                                          \
  struct Products<kN> {                                                                                                \
    /* Sums start from 0 unless `is_sum`. */                                                                           \
    static __device__ __forceinline__ void add(int32_t (&d)[kN / 2], uint64_t x, uint64_t w, bool is_sum) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN              \
                   "k32.s32.s8.s8 {" names "}, " a ", " b ", p;\n}"                                                    \
                   : registers("+r")                                                                                   \
                   : "l"(x), "l"(w), "r"(static_cast<int>(is_sum)));                                                   \
    }                                                                                                                  \
    static __device__ __forceinline__ void add(int32_t (&d)[kN / 2], uint64_t x, uint64_t w, bfloat16) {                 \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32.bf16.bf16 {" names "}, " a ", " b ", 1, 1, 1, 0, 0;" \
                   : registers("+r")                                                                                   \
                   : "l"(x), "l"(w));                                                                                  \
    }                                                                                                                  \
    static __device__ __forceinline__ void add(int32_t (&d)[kN / 2], uint64_t x, uint64_t w, float16){                  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32.f16.f16 {" names "}, " a ", " b ", 1, 1, 1, 0, 0;" \
                   : registers("+r")                                                                                   \
                   : "l"(x), "l"(w));                                                                                  \
    }                                                                                                                  \
  };

#define LOWBIT_REGISTERS_64(c) LOWBIT_32(c, 0)
#define LOWBIT_REGISTERS_128(c) LOWBIT_32(c, 0), LOWBIT_32(c, 32)
#define LOWBIT_REGISTERS_256(c) LOWBIT_32(c, 0), LOWBIT_32(c, 32), LOWBIT_32(c, 64), LOWBIT_32(c, 96)
LOWBIT_PRODUCTS(64, LOWBIT_NAMES_0, LOWBIT_REGISTERS_64, "%32", "%33", "%34")
LOWBIT_PRODUCTS(128, LOWBIT_NAMES_0 ", " LOWBIT_NAMES_1, LOWBIT_REGISTERS_128, "%64", "%65", "%66")
LOWBIT_PRODUCTS(256, LOWBIT_NAMES_0 ", " LOWBIT_NAMES_1 ", " LOWBIT_NAMES_2 ", " LOWBIT_NAMES_3, LOWBIT_REGISTERS_256,
                "%128", "%129", "%130")
#undef LOWBIT_PRODUCTS

}  // namespace lowbit
