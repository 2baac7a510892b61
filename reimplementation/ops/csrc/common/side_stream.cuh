// A second stream for work that is independent of what the current stream goes on with: a fork, and a join.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <map>

namespace reimplementation::cuda {

// Opens a fork from `main` on the current device; closes it at the latest when it goes out of scope: `main` then waits for
// what was launched on `stream()`. Memory that the fork uses may therefore be freed as if `main` had used it, and a graph
// that captures `main` captures the fork. The stream has the highest priority: chains of small kernels get in between
// the blocks of a large one.
class SideStream {
 public:
  SideStream(cudaStream_t main, int32_t device) : main_(main), resources_(of_this_thread(device)) {
    check(cudaEventRecord(resources_.forked, main_));
    check(cudaStreamWaitEvent(resources_.stream, resources_.forked));
  }
  ~SideStream() {
    if (cudaEventRecord(resources_.joined, resources_.stream) == cudaSuccess) {
      cudaStreamWaitEvent(main_, resources_.joined);
    }
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  cudaStream_t stream() const {
    return resources_.stream;
  }

 private:
  struct Resources {
    cudaStream_t stream = nullptr;
    cudaEvent_t forked = nullptr, joined = nullptr;
  };

  // One set for each thread and device: threads that capture graphs at the same time do not meet in one stream.
  static const Resources& of_this_thread(int32_t device) {
    thread_local std::map<int32_t, Resources> all;
    Resources& resources = all[device];
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
