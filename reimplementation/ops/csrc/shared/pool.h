// Things that are dear to make and serve one user at a time.
#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

namespace reimplementation {

// Hands them out and takes them back, in any thread: there are never more of them than were in use at once, unless those that
// were free did not fit.
template <typename T>
class Pool {
 public:
  // The one that came back last of those that `fits` accepts, or what `make` makes.
  template <typename Fits, typename Make>
  T take(const Fits& fits, const Make& make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::find_if(free_.rbegin(), free_.rend(), fits);
      if (found != free_.rend()) {
        T taken = std::move(*found);
        free_.erase(std::next(found).base());
        return taken;
      }
    }
    return make();
  }

  void give_back(T thing) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(thing));
  }

 private:
  std::mutex mutex_;
  std::vector<T> free_;
};

}  // namespace reimplementation
