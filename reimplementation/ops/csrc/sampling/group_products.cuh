// The products of a sample's four pixels with the output's gradient, group by group: what all gradients but the
// features' are made of, in the backward of both aggregations. A *team* of up to 32 lanes spans the channels of a *pass*, some whole groups, in one go or in
// several.
//
// The lanes of a group sum its products by halves, so that each lane ends with one of them:
//
//        lanes of a group   0        1        2        3          a lane passes on the half that it need not keep
//        products           a b c d  a b c d  a b c d  a b c d
//                           a b      a b      c d      c d
//                           a        b        c        d
#pragma once

#include <algorithm>

#include "cuda/corners.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace reimplementation::sampling {

using namespace cuda;

constexpr int MAX_GROUPS = 8;  // of a pass

struct Teams {
  int lanes, log2_lanes;         // a power of two
  int channels, group_channels;  // channels of a group share a weight
  int pass_groups;               // groups of a pass
  int group_lanes;               // that hold one group's vectors, where the sum by halves fits them; else 0
  int group_steps;               // doubling steps that sum a group's lanes otherwise
};

// Teams whose lanes hold NV vectors of VEC channels.
template <int VEC, int NV>
Teams teams_of(int channels, int group_channels) {
  Teams teams = {};
  teams.channels = channels;
  teams.group_channels = group_channels;
  teams.pass_groups =
      std::clamp<int>(WARP * VEC * NV / group_channels, 1, std::min<int>(MAX_GROUPS, channels / group_channels));
  teams.log2_lanes = log2_lanes(teams.pass_groups * group_channels, VEC * NV);
  teams.lanes = 1 << teams.log2_lanes;
  const int group_lanes = std::min(teams.lanes, group_channels / VEC);  // at most, of one vector
  const int vector_channels = group_lanes * VEC;
  const bool whole_vectors = NV == 1 ? group_channels % vector_channels == 0 : group_channels == vector_channels;
  if (whole_vectors && group_lanes == 1 << ceil_log2(group_lanes) && group_lanes >= 4 * NV) {
    teams.group_lanes = group_lanes;
  } else {
    teams.group_steps = ceil_log2(group_lanes);
  }
  return teams;
}

// What a lane holds of a pass.
template <typename T, int VEC, int NV>
struct Lane {
  using C = compute_t<T>;
  static constexpr int NOTHING = -1;

  const T* features[NV];
  C gradient[NV][VEC];  // of the output
  int group[NV];        // within the pass; NOTHING for a lane beyond the last channel
  int lane;
  unsigned team_mask;

  __device__ __forceinline__ Lane(
      const Teams& teams, const T* first_row, const T* grad_output, int first_group, int first_channel, int end_channel)
      : lane(threadIdx.x & (teams.lanes - 1)) {
    team_mask =
        teams.lanes == WARP ? ALL_LANES : ((1u << teams.lanes) - 1) << (threadIdx.x % WARP & ~(teams.lanes - 1));
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      const int channel = first_channel + (k * teams.lanes + lane) * VEC;
      const bool live = channel < end_channel;
      const int readable = live ? channel : end_channel - VEC;
      features[k] = first_row + readable;
      group[k] = live ? channel / teams.group_channels - first_group : NOTHING;
      const Vector<T, VEC> loaded = load_vector<VEC>(grad_output + readable);
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        gradient[k][v] = live ? loaded[v] : C(0);
      }
    }
  }

  // A sample's products in this lane's channels: of vector k and a corner.
  __device__ __forceinline__ void multiply(const Teams& teams, const Four<int>& rows, C (&products)[4 * NV]) const {
    const int row_bytes = teams.channels * static_cast<int>(sizeof(T));
    Vector<T, VEC> corners[NV][4];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        corners[k][corner] = load_vector<VEC>(row_address(features[k], max(rows[corner], 0), row_bytes));
      }
    }
#pragma unroll
    for (int k = 0; k < NV; ++k) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        C sum = 0;
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          sum += corners[k][corner][v] * gradient[k][v];
        }
        products[4 * k + corner] = sum;
      }
    }
  }
};

// The sum by halves, where a group's lanes are a power of two and hold no other group.
template <typename T, int VEC, int NV>
struct SumByHalves {
  int kept,
      kept_group;  // which value a lane ends with, 4 * k + corner, and its group; NOTHING where another has it too

  __device__ __forceinline__ SumByHalves(const Teams& teams, const Lane<T, VEC, NV>& lane) : kept(0) {
    for (int half = 2 * NV, step = teams.group_lanes / 2; half > 0; half /= 2, step /= 2) {
      kept += lane.lane & step ? half : 0;
    }
    kept_group = lane.group[0];
#pragma unroll
    for (int k = 1; k < NV; ++k) {
      kept_group = kept / 4 >= k ? lane.group[k] : kept_group;
    }
    if (lane.lane & (teams.group_lanes / (4 * NV) - 1)) {
      kept_group = lane.NOTHING;
    }
  }

  // Adds the products of all lanes to `totals`, or begins with them.
  __device__ __forceinline__ void add(
      const Teams& teams,
      const Lane<T, VEC, NV>& lane,
      bool first_channels,
      compute_t<T> (&products)[4 * NV],
      Four<compute_t<T>>* totals) const {
    using C = compute_t<T>;
    int step = teams.group_lanes / 2;
#pragma unroll
    for (int half = 2 * NV; half > 0; half /= 2, step /= 2) {
      const bool upper = threadIdx.x & step;
#pragma unroll
      for (int j = 0; j < half; ++j) {
        const C passed = upper ? products[j] : products[j + half];
        products[j] = (upper ? products[j + half] : products[j]) + __shfl_xor_sync(lane.team_mask, passed, step);
      }
    }
    for (; step > 0; step /= 2) {
      products[0] += __shfl_xor_sync(lane.team_mask, products[0], step);
    }
    if (kept_group != lane.NOTHING) {
      C& total = totals[kept_group][kept % 4];
      total = first_channels ? products[0] : total + products[0];
    }
  }
};

// The sum wherever groups begin and end among a team's lanes: each adds what the lane `1 << step` above has, if that
// holds the same group, until the group's first lane has all. Whoever holds a group's first channel begins its totals.
template <typename T, int VEC, int NV>
struct SumBySteps {
  bool head[NV];          // the first lane of its group
  bool begins_group[NV];  // it holds the group's first channel
  int same_group[NV];     // bit `step` tells whether the lane `1 << step` above holds the same group

  __device__ __forceinline__ SumBySteps(const Teams& teams, const Lane<T, VEC, NV>& lane, int first_channel) {
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      const int group_before = __shfl_up_sync(lane.team_mask, lane.group[k], 1, teams.lanes);
      head[k] = lane.group[k] != lane.NOTHING && (lane.lane == 0 || group_before != lane.group[k]);
      begins_group[k] = (first_channel + (k * teams.lanes + lane.lane) * VEC) % teams.group_channels == 0;
      same_group[k] = 0;
      for (int step = 0; step < teams.group_steps; ++step) {
        const int group_above = __shfl_down_sync(lane.team_mask, lane.group[k], 1 << step, teams.lanes);
        same_group[k] |= (lane.lane + (1 << step) < teams.lanes && group_above == lane.group[k]) << step;
      }
    }
  }

  __device__ __forceinline__ void add(
      const Teams& teams,
      const Lane<T, VEC, NV>& lane,
      const compute_t<T> (&products)[4 * NV],
      Four<compute_t<T>>* totals) const {
    using C = compute_t<T>;
#pragma unroll
    for (int k = 0; k < NV; ++k) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        C sum = products[4 * k + corner];
        for (int step = 0; step < teams.group_steps; ++step) {
          const C above = __shfl_down_sync(lane.team_mask, sum, 1 << step, teams.lanes);
          sum += (same_group[k] >> step & 1) ? above : C(0);
        }
        if (head[k]) {
          C& total = totals[lane.group[k]][corner];
          total = begins_group[k] ? sum : total + sum;
        }
      }
      __syncwarp(lane.team_mask);  // the next vector may hold more of the same group
    }
  }
};

// A block's teams take samples in turn, and leave the products of groups first_group, ..., which are one pass, in
// `products`, sample by sample. A function of its own has all registers for its loads, whatever the caller keeps.
template <int VEC, int NV, int THREADS, typename T>
__device__ __noinline__ void multiply_samples(
    const Teams teams,
    const T* features,
    const T* grad_output,
    int first_group,
    int num_groups,
    const Four<int>* rows,
    int samples,
    Four<compute_t<T>>* products) {
  const int team = threadIdx.x >> teams.log2_lanes, num_teams = THREADS >> teams.log2_lanes;
  const int first_channel = first_group * teams.group_channels;
  const int end_channel = first_channel + num_groups * teams.group_channels;
  for (int channel = first_channel; channel < end_channel; channel += teams.lanes * NV * VEC) {
    const Lane<T, VEC, NV> lane(teams, features, grad_output, first_group, channel, end_channel);
    compute_t<T> of_lane[4 * NV];
    if (teams.group_lanes > 0) {
      const SumByHalves<T, VEC, NV> sum(teams, lane);
      for (int sample = team; sample < samples; sample += num_teams) {
        lane.multiply(teams, rows[sample], of_lane);
        sum.add(teams, lane, channel == first_channel, of_lane, products + sample * teams.pass_groups);
      }
    } else {
      const SumBySteps<T, VEC, NV> sum(teams, lane, channel);
      for (int sample = team; sample < samples; sample += num_teams) {
        lane.multiply(teams, rows[sample], of_lane);
        sum.add(teams, lane, of_lane, products + sample * teams.pass_groups);
      }
    }
  }
}

}  // namespace reimplementation::sampling
