// What the harnesses of kernels have in common: checked calls, data that depends on an index alone, times of graphs. Comes after
// the sources of the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define CHECK(call)                                                                        \
  do {                                                                                     \
    const cudaError_t error = (call);                                                      \
    if (error != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (0)

namespace {

struct Shape {
  int rows, cols;
};

// clang-format off
constexpr float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                            -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                            0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                            0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
// clang-format on

__host__ __device__ uint32_t hash(uint32_t i, uint32_t seed) {
  uint32_t x = i * 2654435761u + seed;
  x ^= x >> 16, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u, x ^= x >> 16;
  return x;
}

__global__ void fill_bytes(uint32_t* to, size_t words, uint32_t seed) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words; i += step) {
    to[i] = hash(static_cast<uint32_t>(i), seed);
  }
}

// Uniform numbers from `low` to `low + width`.
__global__ void fill_numbers(void* to, lowbit::Dtype dtype, size_t count, float low, float width, uint32_t seed) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    lowbit::store(to, dtype, i,
                  low + width * static_cast<float>(hash(static_cast<uint32_t>(i), seed) >> 8) / 16777216.0f);
  }
}

// A multiple of 256, where copies of a weight may begin.
inline size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// A float16 or bfloat16.
inline double as_double(uint16_t bits, lowbit::Dtype dtype) {
  if (dtype == lowbit::Dtype::kFloat16) return __half2float(*reinterpret_cast<const __half*>(&bits));
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Median seconds of one of `count` launches in a graph, which is replayed `replays` times after two to warm up.
inline double seconds_of(const std::function<void(int, cudaStream_t)>& body, int count, int replays) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < count; ++i) body(i, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<double> times;
  for (int i = 0; i < replays + 2; ++i) {
    float milliseconds;
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(executable, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i > 1) times.push_back(milliseconds * 1e-3 / count);
  }
  std::sort(times.begin(), times.end());
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaStreamDestroy(stream));
  return times[times.size() / 2];
}

}  // namespace
