// Eight threads take things out of a pool a thousand times each, and give them back. Prints whether somebody met another one's
// thing, how many were made at most, and what a pool answers that has nothing that fits.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "shared/pool.h"

struct Thing {
  int number;
  std::atomic<int>* users;
};

int main() {
  constexpr int THREADS = 8, ROUNDS = 1000;
  reimplementation::Pool<Thing> pool;
  std::vector<std::atomic<int>> users(THREADS * ROUNDS);
  std::atomic<int> made = 0, met = 0;
  const auto any = [](const Thing&) { return true; };
  const auto make = [&] {
    const int number = made++;
    return Thing{number, &users[number]};
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < THREADS; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < ROUNDS; ++round) {
        const Thing thing = pool.take(any, make);
        met += thing.users->fetch_add(1) != 0;
        std::this_thread::yield();
        thing.users->fetch_sub(1);
        pool.give_back(thing);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  const int before = made;
  const Thing other = pool.take([](const Thing&) { return false; }, make);
  pool.give_back(other);
  const Thing again = pool.take(any, make);
  std::printf("%d %d %d %d\n", met.load(), before <= THREADS, other.number == before, again.number == other.number);
}
