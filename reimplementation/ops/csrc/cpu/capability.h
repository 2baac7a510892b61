// One build for every processor: a kernel's body is compiled for several instruction sets, and the best one that this
// machine has is chosen when the kernel runs.
//
// A kernel is a struct with `template <int bytes> void run(int64_t begin, int64_t end) const`, C10_ALWAYS_INLINE
// like all that it calls in its inner loops; `bytes` is the width of the vectors to use.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace reimplementation::cpu {

enum class Capability { baseline, avx2, avx512 };

inline Capability supported_capability() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Capability::avx512 : Capability::avx2;
  }
#endif
  return Capability::baseline;
}

// What the machine has, or less if the environment variable REIMPLEMENTATION_CPU_CAPABILITY (default, avx2 or avx512)
// asks for less; read once.
inline Capability capability() {
  static const Capability chosen = [] {
    const char* variable = std::getenv("REIMPLEMENTATION_CPU_CAPABILITY");
    const std::string name = variable == nullptr ? "" : variable;
    STD_TORCH_CHECK(
        name.empty() || name == "default" || name == "avx2" || name == "avx512",
        "REIMPLEMENTATION_CPU_CAPABILITY must be default, avx2 or avx512; got ", name);
    const Capability limit = name == "default" ? Capability::baseline
        : name == "avx2"                       ? Capability::avx2
                                               : Capability::avx512;
    return std::min(limit, supported_capability());
  }();
  return chosen;
}

#ifdef __x86_64__
template <typename Kernel>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(
    const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<64>(begin, end);
}

template <typename Kernel>
__attribute__((target("avx2,fma"))) void run_avx2(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<32>(begin, end);
}
#endif

template <typename Kernel>
void run(Capability capability, const Kernel& kernel, int64_t begin, int64_t end) {
#ifdef __x86_64__
  switch (capability) {
    case Capability::avx512:
      return run_avx512(kernel, begin, end);
    case Capability::avx2:
      return run_avx2(kernel, begin, end);
    case Capability::baseline:
      break;
  }
#endif
  kernel.template run<16>(begin, end);
}

// How many items a thread takes at least, where each takes about `work` multiplications: for fewer it is not worth
// waking.
inline int64_t items_per_thread(int64_t work) {
  constexpr int64_t least_work = 1 << 16;
  return 1 + least_work / work;
}

// Among how many threads `count` > 0 such items are shared out at most.
inline int64_t shares_of(int64_t count, int64_t work) {
  return 1 + (count - 1) / items_per_thread(work);
}

// Runs the kernel on [0, count), shared out among torch's threads, at least `grain_size` to each.
template <typename Kernel>
void parallel_run(const Kernel& kernel, int64_t count, int64_t grain_size) {
  const Capability chosen = capability();  // here, because a thread's exception loses its message
  torch::stable::parallel_for(
      0, count, grain_size, [&](int64_t begin, int64_t end) { run(chosen, kernel, begin, end); });
}

}  // namespace reimplementation::cpu
