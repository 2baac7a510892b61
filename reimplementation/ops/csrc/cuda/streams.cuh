// A second stream for work that is independent of what the current stream goes on with: a fork, and a join.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace reimplementation::cuda {

// A stream beside `main` on the current device, which nobody else has meanwhile. It has the highest priority: chains of small
// kernels get in between the blocks of a large one. A graph that captures `main` captures it too.
class SideStream {
 public:
  SideStream(cudaStream_t main, int32_t device);
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  // The stream, after it has been told to wait for what was launched on `main` so far.
  cudaStream_t fork();

  // Tells `main` to wait for what was launched on the stream. From then on, and no sooner, memory that this used may be freed
  // as if `main` had used it. Where an exception comes in between, the destructor joins.
  void join();

  // A stream, and the events of its forks and joins.
  struct Resources {
    int32_t device;
    cudaStream_t stream;
    cudaEvent_t forked, joined;
  };

 private:
  cudaError_t try_to_join();

  cudaStream_t main_;
  Resources resources_;
  bool forked_ = false;
};

}  // namespace reimplementation::cuda
