// The form of attention's samples whose locations and weights are computed where a kernel needs them: from reference points,
// offsets and logits.
//
// The team of a unit, before it samples, finds the largest logit and the sum of all exponentials, and leaves them in shared
// memory for those who stage the unit's samples. So logits are read twice, the second time from L1.
#pragma once

#include <limits>
#include <optional>

#include "attention/samples.cuh"
#include "attention_from_offsets/op.h"
#include "cuda/exponential.cuh"

namespace reimplementation::attention_from_offsets {

using namespace cuda;
using attention::Place;
using attention::Problem;
using attention::Strides;

// Of reference points, which have neither heads nor points.
inline Strides reference_strides_of(const Tensor& references) {
  Strides strides = {};
  strides.batch = step(references, 0);
  strides.query = short_step(references, 1);
  strides.level = short_step(references, 2);
  strides.axis = short_step(references, 3);
  return strides;
}

template <typename C>
struct alignas(2 * sizeof(C)) Softmax {
  C largest, inverse_sum;

  // A NaN or an infinite largest logit makes all weights NaN.
  __device__ __forceinline__ C weight(C logit) const {
    return exponential(logit - largest) * inverse_sum;
  }
};

template <typename T, typename L>
struct PredictedSamples {
  using C = compute_t<T>;
  using Weight = L;
  using Softmax = attention_from_offsets::Softmax<C>;

  const C* references;
  const L* offsets;
  const L* logits;
  const C* scales;           // of the levels, or null
  const Softmax* softmaxes;  // (batch, queries, heads), for threads that know no units; else null
  Strides reference_strides, offset_strides, logit_strides, scale_strides;
  C halved_scale;  // of all levels, where there are no scales
  bool are_boxes;

  PredictedSamples() = default;
  // Of tensors from with_short_steps.
  PredictedSamples(
      const Tensor& references, const Tensor& offsets, const Tensor& logits, const std::optional<Tensor>& scales)
      : references(static_cast<const C*>(references.const_data_ptr())),
        offsets(static_cast<const L*>(offsets.const_data_ptr())),
        logits(static_cast<const L*>(logits.const_data_ptr())),
        scales(scales ? static_cast<const C*>(scales->const_data_ptr()) : nullptr),
        softmaxes(nullptr),
        reference_strides(reference_strides_of(references)),
        offset_strides(offsets),
        logit_strides(logits),
        scale_strides(),
        halved_scale(static_cast<C>(0.5) / static_cast<C>(offsets.size(4))),
        are_boxes(references.size(3) == 4) {
    scale_strides.level = scales ? short_step(*scales, 0) : 0;
  }

  // Of a warp's units.
  struct Units {
    Softmax softmaxes[WARP];
    C means[WARP];  // of the weights' gradients, for the backward

    __device__ __forceinline__ Softmax softmax(int unit) const {
      return softmaxes[unit];
    }
  };

  // A unit's logits, by the numbers of their samples.
  struct Logits {
    const L* first;
    int level_step, point_step;
    Divisor points;

    __device__ __forceinline__ C operator[](int sample) const {
      unsigned level = sample;
      const int point = points.split(level);
      return to_compute(first[static_cast<int64_t>(level) * level_step + static_cast<int64_t>(point) * point_step]);
    }
  };
  __device__ __forceinline__ Logits logits_of(const Problem& op, int batch, int query, int head) const {
    return {
        logits + batch * logit_strides.batch + logit_strides.offset(query, head), logit_strides.level,
        logit_strides.point, op.points};
  }

  // In all threads of a warp at a time.
  __device__ __forceinline__ void prepare(const Problem& op, const Place& place, Units& units) const {
    const int unit = op.unit(), team = 1 << op.log2_team, member = threadIdx.x & (team - 1);
    const int query = min(place.query(op, unit), op.num_queries - 1);  // the last one's where there is no such unit
    const Logits logits = logits_of(op, place.batch, query, place.head(op, unit));
    C largest = -std::numeric_limits<C>::infinity();
    for (int sample = member; sample < op.samples; sample += team) {
      const C logit = logits[sample];
      largest = logit > largest ? logit : largest;
    }
    for (int step = team / 2; step > 0; step /= 2) {
      const C other = __shfl_xor_sync(ALL_LANES, largest, step);
      largest = other > largest ? other : largest;
    }
    C sum = 0;
    for (int sample = member; sample < op.samples; sample += team) {
      sum += exponential(logits[sample] - largest);
    }
    for (int step = team / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(ALL_LANES, sum, step);
    }
    if (member == 0) {
      units.softmaxes[unit] = {largest, 1 / sum};
    }
    __syncwarp();
  }

  __device__ __forceinline__ Softmax softmax(int64_t unit) const {
    return softmaxes[unit];
  }

  struct Pointers {
    const C* reference;
    const L* offset;
    const L* logit;
    C halved_scale;

    __device__ __forceinline__ Pointers kept() const {
      return {keep_global(reference), keep_global(offset), keep_global(logit), halved_scale};
    }
  };
  struct Loaded {
    C x, y, box_x, box_y;  // box_x, box_y: what an offset of 1 is, of a box
    L offset_x, offset_y, logit;
  };
  struct Found : attention::Found<C> {
    Reference<C> reference_x, reference_y;
  };

  template <typename Offset>
  __device__ __forceinline__ Pointers pointers(const Offset& offset) const {
    return {
        references + offset(reference_strides), offsets + offset(offset_strides), logits + offset(logit_strides),
        scales == nullptr ? halved_scale : scales[offset(scale_strides)] / 2};
  }
  template <typename Offset, typename Loader>
  __device__ __forceinline__ Loaded load(const Pointers& from, const Offset& offset, const Loader& loader) const {
    const C* reference = from.reference + offset(reference_strides);
    const L* xy = from.offset + offset(offset_strides);
    Loaded loaded = {
        reference[0],
        reference[reference_strides.axis],
        0,
        0,
        loader(xy),
        loader(xy + offset_strides.axis),
        loader(from.logit + offset(logit_strides))};
    if (are_boxes) {
      loaded.box_x = reference[2 * static_cast<int64_t>(reference_strides.axis)] * from.halved_scale;
      loaded.box_y = reference[3 * static_cast<int64_t>(reference_strides.axis)] * from.halved_scale;
    }
    return loaded;
  }
  __device__ __forceinline__ Found find(const Loaded& loaded, const Level& level, const Softmax& softmax) const {
    const Reference<C> x = {loaded.x, are_boxes ? loaded.box_x : static_cast<C>(level.width), !are_boxes};
    const Reference<C> y = {loaded.y, are_boxes ? loaded.box_y : static_cast<C>(level.height), !are_boxes};
    return {
        {x.location(to_compute(loaded.offset_x)), y.location(to_compute(loaded.offset_y)),
         softmax.weight(to_compute(loaded.logit))},
        x,
        y};
  }
};

// The tensors that kernels read, from a call that was checked.
struct ReadableArguments {
  Tensor value, references, offsets, logits;
  std::optional<Tensor> scales;

  explicit ReadableArguments(const Arguments& arguments)
      : value(as_contiguous(arguments.value)),
        references(with_short_steps(arguments.reference_points)),
        offsets(with_short_steps(arguments.sampling_offsets)),
        logits(with_short_steps(arguments.attention_logits)),
        scales(as_contiguous(arguments.offset_scale)) {}

  // Calls `body` with a null T* of the value's type, and the form.
  template <typename Body>
  void dispatch(const Body& body) const {
    dispatch_types(value, logits, [&](auto* t, auto* l) {
      body(
          t,
          PredictedSamples<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(l)>>(
              references, offsets, logits, scales));
    });
  }
};

}  // namespace reimplementation::attention_from_offsets
