// Reads calls of the features' gradient, one a line: nine sizes, whether it is deterministic, whether queries come one by one.
// Prints for each the largest share, or that it is too large; and then all shares.
#include <cstdio>
#include <stdexcept>

#include "feature_gradient/division.h"

using namespace reimplementation::feature_gradient;

int main() {
  constexpr int MULTIPROCESSORS = 132;
  Sizes s;
  int deterministic, single;
  while (std::scanf(
             "%ld %ld %ld %ld %ld %ld %ld %ld %ld %d %d", &s.batch, &s.heads, &s.queries, &s.points, &s.cams, &s.levels,
             &s.rows, &s.channels, &s.groups, &deterministic, &single) == 11) {
    try {
      const Division most = divide(s, deterministic != 0, single != 0, MULTIPROCESSORS);
      std::printf(
          "%ld %ld %ld %ld %ld %ld %ld", most.batches, most.queries, most.samples, most.tiles, most.keys,
          most.crowded_from, most.most_crowded);
      for_each_share(s, most, [](const Share& share) {
        std::printf(" %ld %ld %ld %ld", share.batch, share.batches, share.query, share.queries);
      });
      std::printf("\n");
    } catch (const std::exception&) {
      std::printf("too large\n");
    }
  }
}
