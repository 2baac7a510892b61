#include "cuda/streams.cuh"

#include "cuda/launch.cuh"
#include "shared/pool.h"

namespace reimplementation::cuda {
namespace {

// For as long as the process lives: when it ends, CUDA may be gone before this would be.
Pool<SideStream::Resources>& pool() {
  static auto& all = *new Pool<SideStream::Resources>;
  return all;
}

void check(cudaError_t error) {
  check_cuda(error, "a second CUDA stream could not be used");
}

// The number of the graph that captures a stream; 0 where none does.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = ~0ull;  // stays where the capture has failed
  check(cudaStreamGetCaptureInfo(stream, &status, &number));
  return status == cudaStreamCaptureStatusNone ? 0 : number;
}

// Once it has been forked off a stream that is captured, a stream belongs to that graph until the capture ends.
SideStream::Resources take(cudaStream_t main, int32_t device) {
  const unsigned long long capture = capture_of(main);
  const auto fits = [&](const SideStream::Resources& resources) {
    const unsigned long long theirs = resources.device == device ? capture_of(resources.stream) : 0;
    return resources.device == device && (theirs == 0 || theirs == capture);
  };
  return pool().take(fits, [&] {
    SideStream::Resources made = {device};
    int lowest = 0, highest = 0;
    check(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    check(cudaEventCreateWithFlags(&made.forked, cudaEventDisableTiming));
    check(cudaEventCreateWithFlags(&made.joined, cudaEventDisableTiming));
    check(cudaStreamCreateWithPriority(&made.stream, cudaStreamNonBlocking, highest));
    return made;
  });
}

}  // namespace

SideStream::SideStream(cudaStream_t main, int32_t device) : main_(main), resources_(take(main, device)) {}

SideStream::~SideStream() {
  if (forked_) {
    try_to_join();  // the exception that came in between is the one to report
  }
  pool().give_back(resources_);
}

cudaStream_t SideStream::fork() {
  check(cudaEventRecord(resources_.forked, main_));
  check(cudaStreamWaitEvent(resources_.stream, resources_.forked));
  forked_ = true;
  return resources_.stream;
}

void SideStream::join() {
  check(try_to_join());
}

cudaError_t SideStream::try_to_join() {
  forked_ = false;
  const cudaError_t error = cudaEventRecord(resources_.joined, resources_.stream);
  return error != cudaSuccess ? error : cudaStreamWaitEvent(main_, resources_.joined);
}

}  // namespace reimplementation::cuda
