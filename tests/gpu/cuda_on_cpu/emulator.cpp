// Runs the threads of a kernel on the CPU; see cuda_runtime_api.h. What a GPU leaves undefined ends the process with a message: a thread
// that ends while others of its block wait for it, and a shuffle in which not all lanes of a warp take part.
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kMostThreads = 1024;
enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Thread {
  ucontext_t place;
  State state = State::kReady;
  unsigned shuffles = 0;
  uint64_t given[2] = {};  // by turns: a lane may be one shuffle ahead of another
};

std::mt19937 random_order(0);
std::vector<std::unique_ptr<char[]>> stacks(kMostThreads);
std::vector<Thread> threads;  // of the block that runs
unsigned current = 0;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;

// AddressSanitizer has to know the stack in use.
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] size_t scheduler_bytes = 0;

void before_switch([[maybe_unused]] void** keep, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(keep, stack, bytes);
#endif
}
void after_switch([[maybe_unused]] void* kept, [[maybe_unused]] bool from_scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, from_scheduler ? &scheduler_stack : nullptr, from_scheduler ? &scheduler_bytes : nullptr);
#endif
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the CPU: block %u, thread %u: %s\n", blockIdx.x, current, what);
  std::abort();
}

void begin() {
  after_switch(nullptr, true);
  (*body)();
  threads[current].state = State::kDone;
  before_switch(nullptr, scheduler_stack, scheduler_bytes);
  setcontext(&scheduler);
}

void resume(unsigned thread) {
  current = thread;
  threadIdx = dim3(thread, 0, 0);
  void* kept = nullptr;
  before_switch(&kept, stacks[thread].get(), kStackBytes);
  swapcontext(&scheduler, &threads[thread].place);
  after_switch(kept, false);
}

void wait(State state) {
  threads[current].state = state;
  void* kept = nullptr;
  before_switch(&kept, scheduler_stack, scheduler_bytes);
  swapcontext(&threads[current].place, &scheduler);
  after_switch(kept, true);
}

// Lets threads [first, last) go on if all of them wait at `state`.
bool release(unsigned first, unsigned last, State state) {
  const auto begin = threads.begin() + first, end = threads.begin() + last;
  if (!std::all_of(begin, end, [&](const Thread& thread) { return thread.state == state; })) return false;
  std::for_each(begin, end, [](Thread& thread) { thread.state = State::kReady; });
  return true;
}

void run_block(unsigned count) {
  threads.assign(count, Thread());
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    order[i] = i;
    if (!stacks[i]) stacks[i] = std::make_unique<char[]>(kStackBytes);
    getcontext(&threads[i].place);
    threads[i].place.uc_stack = {stacks[i].get(), 0, kStackBytes};
    makecontext(&threads[i].place, begin, 0);
  }
  while (true) {
    std::shuffle(order.begin(), order.end(), random_order);
    for (const unsigned i : order) {
      if (threads[i].state == State::kReady) resume(i);
    }
    if (release(0, count, State::kDone)) return;
    bool any = release(0, count, State::kAtBlock);
    for (unsigned first = 0; first < count; first += kWarp) {
      any |= release(first, std::min(count, first + kWarp), State::kAtWarp);
    }
    if (!any) fail("waits for threads that never come");
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 0xffffu || block.x == 0 || block.x > kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  std::vector<unsigned> order(grid.x * grid.y);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_order);
  for (const unsigned i : order) {
    blockIdx = dim3(i % grid.x, i / grid.x, 0);
    run_block(block.x);
  }
  return cudaSuccess;
}

void meet_block() { wait(State::kAtBlock); }

int lane() { return static_cast<int>(current % kWarp); }

uint64_t exchange(uint64_t bits, int lane) {
  const unsigned self = current, turn = threads[self].shuffles++ % 2;
  threads[self].given[turn] = bits;
  wait(State::kAtWarp);
  const unsigned other = self / kWarp * kWarp + static_cast<unsigned>(lane);
  if (other >= threads.size()) fail("shuffles with a lane that the block lacks");
  return threads[other].given[turn];
}

}  // namespace emulated
