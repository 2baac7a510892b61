// Where the gradient of the features has its samples' weights from: memory, here. Another source has the same members.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "feature_gradient/feature_gradient.cuh"
#include "feature_gradient/tiles.cuh"

namespace reimplementation::feature_gradient {

template <typename W>
struct GivenWeights {
  using Key = int64_t;  // what tells a sample's weights from those of others
  using Value = W;      // what one is made of by `to_compute`

  // Those of an image, for one group and the ones behind it.
  struct OfGroup {
    const W* first;
    int group_step;

    __device__ __forceinline__ Value load(Key key, int /* query */, int groups_behind) const {
      return first[key + static_cast<int64_t>(groups_behind) * group_step];
    }
  };

  const W* first;
  int64_t strides[2];  // batch and head
  int steps[5];        // query, point, camera, level, group
  int64_t query_step;

  GivenWeights() = default;
  explicit GivenWeights(const SampledOp& op)
      : first(static_cast<const W*>(op.weights.const_data_ptr())),
        strides{op.weight_steps[0], op.weight_steps[1]},
        query_step(op.weight_steps[2]) {
    for (int i = 0; i < 5; ++i) {
      // Of long steps from query to query nobody takes one: queries are then taken one by one.
      steps[i] = i == 0 && has_long_query_steps() ? 0 : short_step(op.weight_steps[2 + i]);
    }
  }

  // Whether a step from query to query does not fit 32 bits.
  bool has_long_query_steps() const {
    return query_step > INT_MAX;
  }
  // The same, seen from a later batch element and query.
  GivenWeights from(int64_t batch, int64_t query) const {
    GivenWeights later = *this;
    later.first += batch * strides[0] + query * query_step;
    return later;
  }
  __device__ __forceinline__ OfGroup of_group(int batch, int head, int group) const {
    return {first + batch * strides[0] + head * strides[1] + static_cast<int64_t>(group) * steps[4], steps[4]};
  }
  __device__ __forceinline__ Key key(const Place& place) const {
    return place.offset(steps);
  }
};

}  // namespace reimplementation::feature_gradient
