// How long runs take, and how much memory they held at most.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

// Milliseconds of runs. The deviation is the sample's, and no number for a single one.
struct Latency {
  double mean, deviation, least, most;
};

inline void wait_for(const c10::Device& device) {
  if (!device.is_cpu()) {
    c10::impl::VirtualGuardImpl guard(device.type());
    guard.synchronizeDevice(device.has_index() ? device.index() : guard.getDevice().index());
  }
}

inline Latency measure(const std::function<void()>& run, const c10::Device& device, long warmup, long iterations) {
  for (long i = 0; i < warmup; ++i) {
    run();
  }
  std::vector<double> times;
  for (long i = 0; i < iterations; ++i) {
    wait_for(device);
    const auto start = std::chrono::steady_clock::now();
    run();
    wait_for(device);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  const double count = static_cast<double>(times.size());
  const double mean = std::accumulate(times.begin(), times.end(), 0.0) / count;
  double squares = 0;
  for (const double time : times) {
    squares += (time - mean) * (time - mean);
  }
  const auto [least, most] = std::ranges::minmax(times);
  return {mean, std::sqrt(squares / (count - 1)), least, most};
}

// Bytes: on a GPU what PyTorch's allocator gave out at once; on the CPU what the process held in memory.
inline double peak_memory(const c10::Device& device) {
  if (device.is_cpu()) {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_maxrss) * 1024;
  }
  const c10::DeviceIndex index =
      device.has_index() ? device.index() : c10::impl::VirtualGuardImpl(device.type()).getDevice().index();
  const auto stats = at::getDeviceAllocator(device.type())->getDeviceStats(index);
  return static_cast<double>(
      stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak);
}
