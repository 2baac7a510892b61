// A second stream for work that is independent of what the current stream goes on with: a fork, and a join.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <map>
#include <utility>

namespace reimplementation::cuda {

// A stream beside `main` on the current device. When it goes out of scope, `main` waits for what was launched on it; from
// then on, and no sooner, memory that this used may be freed as if `main` had used it. A graph that captures `main`
// captures it too. It has the highest priority: chains of small kernels get in between the blocks of a large one.
// Where one forks off another, they have different numbers.
class SideStream {
 public:
  SideStream(cudaStream_t main, int32_t device, int number) : main_(main), resources_(of_this_thread(device, number)) {}
  ~SideStream() {
    if (cudaEventRecord(resources_.joined, resources_.stream) == cudaSuccess) {
      cudaStreamWaitEvent(main_, resources_.joined);
    }
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  // The stream, after it has been told to wait for what was launched on `main` so far.
  cudaStream_t follow() const {
    check(cudaEventRecord(resources_.forked, main_));
    check(cudaStreamWaitEvent(resources_.stream, resources_.forked));
    return resources_.stream;
  }

 private:
  struct Resources {
    cudaStream_t stream = nullptr;
    cudaEvent_t forked = nullptr, joined = nullptr;
  };

  // One set for each thread, device and number: threads that capture graphs at the same time do not meet in one stream.
  static const Resources& of_this_thread(int32_t device, int number) {
    thread_local std::map<std::pair<int32_t, int>, Resources> all;
    Resources& resources = all[{device, number}];
    if (resources.stream == nullptr) {
      int lowest = 0, highest = 0;
      check(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
      check(cudaEventCreateWithFlags(&resources.forked, cudaEventDisableTiming));
      check(cudaEventCreateWithFlags(&resources.joined, cudaEventDisableTiming));
      check(cudaStreamCreateWithPriority(&resources.stream, cudaStreamNonBlocking, highest));
    }
    return resources;
  }
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "a second CUDA stream could not be used: ", cudaGetErrorString(error));
  }

  cudaStream_t main_;
  const Resources& resources_;
};

}  // namespace reimplementation::cuda
