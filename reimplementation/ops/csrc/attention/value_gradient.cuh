// The value's gradient of multi-scale deformable attention on CUDA, where many samples meet in a row and the order in which
// they are added need not repeat.
//
// Atomics are dear: each sends a corner's D channels through the links of L2, four times a sample. But neighbouring queries
// sample like places: in an encoder, the corners of 64 queries in one level lie on a tenth to a third as many rows. So a block
// takes some hundred samples of neighbouring queries in one head and level, and adds to each row once:
//
//   1. each thread computes the footprints of its samples. A corner is an *entry*: a weight, a row, and a query. Entries of
//      one row count each other, in a window of the level's rows around the middle sample's; the first of a row makes it
//      an *item*. A row outside of the window is not searched for: each entry makes an item of its own;
//   2. items get their ranges of the sorted entries, in any order;
//   3. entries go there;
//   4. teams of lanes, which span the channels, take equal shares of the sorted entries, add weight * gradient of the
//      query's output up in registers, and add the sum to the item's row, atomically, where an item or their share ends.
//
// Which entry of a row comes first changes from run to run, and so does the order of the atomics. What binds it is L1, which
// has shared memory, the rows of the output's gradient and the atomics to serve.
#pragma once

#include "attention/samples.cuh"
#include "cuda/corners.cuh"
#include "cuda/divisor.cuh"
#include "cuda/vector.cuh"

namespace reimplementation::attention {

// Whether it is worth while: a row is added to `SHARED` times on average. Of an encoder's it is 64 times, of 900 queries' 3.
// And whether 32 bits number the samples of a head and level, those by which the last block is too large included.
inline bool rows_are_shared(const Sizes& sizes) {
  constexpr int64_t SHARED = 24;
  return 4 * sizes.num_queries * sizes.num_levels * sizes.num_points >= SHARED * sizes.num_values &&
      sizes.num_queries * sizes.num_points <= INT_MAX - 512;
}

namespace value_gradient {

constexpr int SAMPLES_A_THREAD = 2;
constexpr int CORNERS = 4 * SAMPLES_A_THREAD;  // of a thread
constexpr int IN_FLIGHT = 2;                   // entries of a team
constexpr int NO_ITEM = 1 << 20;               // the item of entries that fill up the last share
constexpr int QUERY_BITS = 9;
constexpr int HALF_BITS = 16;  // two numbers of entries, or of items, in one word
constexpr unsigned HALF = (1u << HALF_BITS) - 1;

// As large as shared memory lets it be: the more samples, the fewer atomics.
template <typename C>
struct Block {
  static constexpr int THREADS = sizeof(C) == 8 ? 128 : 256;
  static constexpr int SAMPLES = SAMPLES_A_THREAD * THREADS;
  static constexpr int ENTRIES = 4 * SAMPLES;
  static constexpr int WINDOW = 8 * SAMPLES;  // rows
  static constexpr int ON_A_MULTIPROCESSOR = 1024 / THREADS;
  static_assert(SAMPLES <= 1 << QUERY_BITS && ENTRIES < 1 << HALF_BITS && ENTRIES < NO_ITEM);
};

template <typename T, typename Form>
struct ValueProblem {
  const T* grad_output;      // (batch, queries, heads, channels)
  compute_t<T>* grad_value;  // (batch, values, heads, channels)
  Form form;
  LevelTable levels;
  int num_queries, num_heads, channels, num_levels, num_points;
  int log2_lanes;
  Divisor tiles;  // blocks that the samples of a head and level take
  Divisor heads_and_levels, levels_of_a_head, points;
};

template <typename C>
struct alignas(2 * sizeof(C)) Entry {
  C weight;
  int key;  // item << QUERY_BITS | query, from the block's first
};

template <typename C>
struct alignas(IN_FLIGHT * sizeof(Entry<C>)) Entries {
  Entry<C> values[IN_FLIGHT];
};

template <typename C>
struct Shared {
  unsigned window[Block<C>::WINDOW + WARP];  // a row's number of entries; after step 1 item << HALF_BITS | first entry
  int rows[Block<C>::ENTRIES];               // of the items: first those of the window
  Entries<C> entries[Block<C>::ENTRIES / IN_FLIGHT + 1];
  int window_start;
  unsigned new_items;  // outside of the window << HALF_BITS | in it
  unsigned entries_in_window;
};

// Which samples a block has: of one head and level, in the order of queries and points.
template <typename T, typename Form>
struct Tile {
  int batch, head, level;
  int first_query, first_point, count;
  typename Form::Pointers pointers;  // of the first query

  __device__ explicit Tile(const ValueProblem<T, Form>& op) {
    unsigned tile = blockIdx.x;
    unsigned unit = op.heads_and_levels.split(tile);
    level = op.levels_of_a_head.split(unit);
    head = static_cast<int>(unit);
    const int first = op.tiles.split(tile) * Block<compute_t<T>>::SAMPLES;
    batch = static_cast<int>(tile);
    unsigned query = first;
    first_point = op.points.split(query);
    first_query = static_cast<int>(query);
    count = min(op.num_queries * op.num_points - first, Block<compute_t<T>>::SAMPLES);
    pointers = op.form.pointers([&](const Strides& strides) {
      return batch * strides.batch + strides.offset(first_query, head) + static_cast<int64_t>(level) * strides.level;
    });
  }
};

template <typename Form>
struct TileSample {
  int query;  // from the block's first
  typename Form::Loaded loaded;
  typename Form::Softmax softmax;

  TileSample() = default;
  template <typename T>
  __device__ TileSample(const ValueProblem<T, Form>& op, const Tile<T, Form>& tile, int i) {
    unsigned number = tile.first_point + i;
    const int point = op.points.split(number);
    query = static_cast<int>(number);
    loaded = op.form.load(
        tile.pointers,
        [&](const Strides& strides) {
          return static_cast<int64_t>(query) * strides.query + static_cast<int64_t>(point) * strides.point;
        },
        Load());
    softmax = op.form.softmax(
        (static_cast<int64_t>(tile.batch) * op.num_queries + tile.first_query + query) * op.num_heads + tile.head);
  }
};

// The first row of the window: that of a level which fits, else so that a sample's pixel is in the middle.
template <typename C>
__device__ __forceinline__ int window_start(const Level& level, const Found<C>& sample) {
  constexpr int WINDOW = Block<C>::WINDOW;
  const int hidden = level.height * level.width - WINDOW;
  const int x = min(max(static_cast<int>(sample.x * level.width), 0), level.width - 1);
  const int y = min(max(static_cast<int>(sample.y * level.height), 0), level.height - 1);
  return level.start + max(min(y * level.width + x - WINDOW / 2, hidden), 0);
}

// Takes `count` numbers off a counter for each lane; returns the first.
__device__ __forceinline__ unsigned take(unsigned* counter, unsigned count) {
  const unsigned up_to_here = sum_up_to_lane(count);
  unsigned first = 0;
  if (threadIdx.x % WARP == WARP - 1) {
    first = atomicAdd(counter, up_to_here);
  }
  return __shfl_sync(ALL_LANES, first, WARP - 1) + up_to_here - count;
}

// What a thread has in its registers from step to step: the corners of its samples.
template <typename C>
struct Corners {
  C weights[CORNERS];
  int rows[CORNERS];
  int queries[SAMPLES_A_THREAD];
  int slots[CORNERS];  // in the window; WINDOW or more where there is none, and each lane has its own
  int ranks[CORNERS];  // among the entries of the row
  unsigned new_items;  // that it makes: outside of the window << HALF_BITS | in it
  unsigned taken;      // the first of each, from what its warp took

  __device__ bool in_window(int k) const {
    return slots[k] < Block<C>::WINDOW;
  }
  __device__ bool is_outside(int k) const {
    return !in_window(k) && weights[k] != 0;
  }
};

// Step 1: the footprints. One thread has the middle sample, and places the window.
template <typename C, typename Form>
__device__ __forceinline__ void find_corners(
    const Form& form,
    const TileSample<Form> (&samples)[SAMPLES_A_THREAD],
    int count,
    const Level& level,
    Corners<C>& corners,
    Shared<C>& shared) {
#pragma unroll
  for (int i = 0; i < SAMPLES_A_THREAD; ++i) {
    const typename Form::Found sample = form.find(samples[i].loaded, level, samples[i].softmax);
    const int number = static_cast<int>(threadIdx.x) + i * Block<C>::THREADS;
    const C x = pixel_position(sample.x, level.width), y = pixel_position(sample.y, level.height);
    Four<C> corner_weight = {};
    Four<int> corner_row = {};
    if (number < count && touches_level(x, y, level.width, level.height)) {
      const Axis<C> x_axis = bilinear_axis(x, level.width), y_axis = bilinear_axis(y, level.height);
      corner_weight = corner_weights(x_axis, y_axis);
      corner_row = corner_rows(level, x_axis, y_axis);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        corner_weight[corner] *= sample.attention;  // only here: it may be NaN
      }
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      corners.weights[4 * i + corner] = corner_weight[corner];
      corners.rows[4 * i + corner] = corner_row[corner];
    }
    corners.queries[i] = samples[i].query;
    if (number == count / 2) {
      shared.window_start = window_start(level, sample);
    }
  }
}

// Step 1: the ranks, and the items. Corners that weigh nothing are no entries.
template <typename C>
__device__ __forceinline__ void count_entries(int start, Corners<C>& corners, Shared<C>& shared) {
  constexpr int WINDOW = Block<C>::WINDOW;
#pragma unroll
  for (int k = 0; k < CORNERS; ++k) {
    const unsigned slot = corners.rows[k] - start;
    corners.slots[k] = corners.weights[k] != 0 && slot < WINDOW ? slot : WINDOW + threadIdx.x % WARP;
    corners.ranks[k] = static_cast<int>(atomicAdd(&shared.window[corners.slots[k]], 1u));
  }
  corners.new_items = 0;
#pragma unroll
  for (int k = 0; k < CORNERS; ++k) {
    corners.new_items += corners.in_window(k) ? corners.ranks[k] == 0 : (corners.weights[k] != 0) << HALF_BITS;
  }
  corners.taken = take(&shared.new_items, corners.new_items);
  int* new_row = shared.rows + (corners.taken & HALF);
#pragma unroll
  for (int k = 0; k < CORNERS; ++k) {
    if (corners.in_window(k) && corners.ranks[k] == 0) {
      *new_row++ = corners.rows[k];
    }
  }
}

// Step 2.
template <typename C>
__device__ __forceinline__ void place_items(int start, int items, Shared<C>& shared) {
#pragma unroll 1
  for (int item = threadIdx.x; item - threadIdx.x % WARP < items; item += Block<C>::THREADS) {
    unsigned* slot = shared.window + (item < items ? shared.rows[item] - start : 0);
    const unsigned first = take(&shared.entries_in_window, item < items ? *slot : 0);
    if (item < items) {
      *slot = static_cast<unsigned>(item) << HALF_BITS | first;
    }
  }
}

// Step 3: those outside of the window come last.
template <typename C>
__device__ __forceinline__ void sort_entries(int items, int in_window, const Corners<C>& corners, Shared<C>& shared) {
  Entry<C>* const entries = shared.entries[0].values;
#pragma unroll
  for (int k = 0; k < CORNERS; ++k) {
    const unsigned place = shared.window[corners.slots[k]];
    if (corners.in_window(k)) {
      const unsigned item = place >> HALF_BITS;
      entries[(place & HALF) + corners.ranks[k]] = {
          corners.weights[k], static_cast<int>(item << QUERY_BITS | corners.queries[k / 4])};
    }
  }
  if (corners.new_items >> HALF_BITS != 0) {
    int number = corners.taken >> HALF_BITS;
#pragma unroll
    for (int k = 0; k < CORNERS; ++k) {
      if (corners.is_outside(k)) {
        shared.rows[items + number] = corners.rows[k];
        entries[in_window + number] = {corners.weights[k], (items + number) << QUERY_BITS | corners.queries[k / 4]};
        ++number;
      }
    }
  }
}

// Step 4 for one vector of channels a lane: a team's entries, from number `begin` of `IN_FLIGHT` each to `end`.
template <int VEC, typename T, typename C>
__device__ __forceinline__ void add_entries(
    const Shared<C>& shared, int begin, int end, const T* grad_output, C* grad_value, int row) {
  C sums[VEC] = {};
  int item = shared.entries[begin].values[0].key >> QUERY_BITS;
  auto add = [&] {
    atomic_add_vector(row_address(grad_value, shared.rows[item], row * static_cast<int>(sizeof(C))), sums);
  };
  for (; begin < end; ++begin) {
    const Entries<C> entries = shared.entries[begin];
    Vector<T, VEC> gradients[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int query = entries.values[i].key & ((1 << QUERY_BITS) - 1);
      gradients[i] = load_vector<VEC>(row_address(grad_output, query, row * static_cast<int>(sizeof(T))));
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int next = entries.values[i].key >> QUERY_BITS;
      const bool same = next == item;
      if (!same) {
        add();
      }
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        sums[v] = (same ? sums[v] : 0) + entries.values[i].weight * gradients[i][v];
      }
      item = next;
    }
  }
  if (item != NO_ITEM) {
    add();
  }
}

template <typename T, typename Form, int VEC>
__global__ void __launch_bounds__(Block<compute_t<T>>::THREADS, Block<compute_t<T>>::ON_A_MULTIPROCESSOR)
    value_gradient_kernel(const ValueProblem<T, Form> op) {
  using C = compute_t<T>;
  constexpr int THREADS = Block<C>::THREADS;
  __shared__ Shared<C> shared;
  const Tile<T, Form> tile(op);
  TileSample<Form> samples[SAMPLES_A_THREAD];
#pragma unroll
  for (int i = 0; i < SAMPLES_A_THREAD; ++i) {
    samples[i] = TileSample<Form>(op, tile, min(static_cast<int>(threadIdx.x) + i * THREADS, tile.count - 1));
  }
  const Level level = op.levels[tile.level];
  if (level.empty()) {
    return;
  }
  for (int i = threadIdx.x; 4 * i < min(Block<C>::WINDOW, level.height * level.width); i += THREADS) {
    reinterpret_cast<uint4*>(shared.window)[i] = {};
  }
  if (threadIdx.x == 0) {
    shared.new_items = 0;
    shared.entries_in_window = 0;
  }
  Corners<C> corners;
  find_corners(op.form, samples, tile.count, level, corners, shared);
  __syncthreads();
  const int start = shared.window_start;
  count_entries(start, corners, shared);
  __syncthreads();
  const int items = static_cast<int>(shared.new_items & HALF);
  const int items_outside = static_cast<int>(shared.new_items >> HALF_BITS);
  place_items(start, items, shared);
  __syncthreads();
  const int in_window = shared.entries_in_window, count = in_window + items_outside;
  sort_entries(items, in_window, corners, shared);
  if (threadIdx.x < IN_FLIGHT) {
    shared.entries[0].values[count + threadIdx.x] = {0, NO_ITEM << QUERY_BITS};
  }
  __syncthreads();

  // A share is an odd number of steps: what the teams of a warp read at a time lies on different banks.
  const int steps = (count + IN_FLIGHT - 1) / IN_FLIGHT;
  const int share = ((steps << op.log2_lanes) + THREADS - 1) / THREADS | 1;
  const int begin = (static_cast<int>(threadIdx.x) >> op.log2_lanes) * share, end = min(begin + share, steps);
  if (begin >= end) {
    return;
  }
  const int row = op.num_heads * op.channels;
  const int64_t first_row = static_cast<int64_t>(tile.batch) * op.num_queries + tile.first_query;
  const T* const grad_outputs = op.grad_output + first_row * row + tile.head * op.channels;
  C* const grad_values = op.grad_value + tile.batch * op.levels.num_rows * row + tile.head * op.channels;
  const int lane = threadIdx.x & ((1 << op.log2_lanes) - 1);
  for (int channel = lane * VEC; channel < op.channels; channel += VEC << op.log2_lanes) {
    add_entries<VEC>(shared, begin, end, grad_outputs + channel, grad_values + channel, row);
  }
}

}  // namespace value_gradient

// Adds the gradient to `grad_value` (batch, values, heads, channels), which is contiguous, aligned to 16 bytes, and of the
// type that sums run in. `grad_output` (batch, queries, heads, channels) is contiguous.
template <typename T, typename Form>
void add_value_gradient(
    const Sizes& sizes,
    const Tensor& grad_output,
    const LevelTable& levels,
    const Form& form,
    const Tensor& grad_value,
    cudaStream_t stream) {
  using Block = value_gradient::Block<compute_t<T>>;
  const int64_t tiles = (sizes.num_queries * sizes.num_points + Block::SAMPLES - 1) / Block::SAMPLES;
  const int64_t blocks = sizes.batch * tiles * sizes.num_heads * sizes.num_levels;
  STD_TORCH_CHECK(blocks <= INT_MAX, "batch * queries * samples is too large: it takes ", blocks, " blocks");
  value_gradient::ValueProblem<T, Form> op = {};
  set_sizes(op, sizes);
  op.form = form;
  op.levels = levels;
  op.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
  op.grad_value = static_cast<compute_t<T>*>(grad_value.mutable_data_ptr());
  op.tiles = Divisor(tiles);
  op.heads_and_levels = Divisor(sizes.num_heads * sizes.num_levels);
  op.levels_of_a_head = Divisor(sizes.num_levels);
  op.points = Divisor(sizes.num_points);
  const auto grid = static_cast<unsigned>(blocks);
  constexpr int VEC = 16 / sizeof(compute_t<T>);  // so that the atomics of neighbouring lanes are neighbours
  const bool vectorizes = can_vectorize<T>(sizes, grad_output, VEC);
  op.log2_lanes = log2_lanes(sizes.channels, vectorizes ? VEC : 1);
  if (vectorizes) {
    value_gradient::value_gradient_kernel<T, Form, VEC><<<grid, Block::THREADS, 0, stream>>>(op);
  } else {
    value_gradient::value_gradient_kernel<T, Form, 1><<<grid, Block::THREADS, 0, stream>>>(op);
  }
  check_launch("ms_deform_attn_backward");
}

}  // namespace reimplementation::attention
