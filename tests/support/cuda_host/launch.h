// The C functions that tests/support/host_launcher.py calls.
#pragma once
#include <tuple>

#include "primitives.h"

namespace qmir_host {

template <class T>
constexpr char letter() {
  if constexpr (std::is_pointer_v<T>) return 'p';
  if constexpr (std::is_same_v<T, float>) return 'f';
  if constexpr (std::is_same_v<T, double>) return 'd';
  if constexpr (std::is_integral_v<T>) return sizeof(T) == 8 ? 'l' : 'i';
  return '?';
}

// Reads the arguments of a kernel from 8-byte slots.
template <auto kKernel>
struct Entry;

template <class... Args, void (*kKernel)(Args...)>
struct Entry<kKernel> {
  static constexpr char signature[] = {letter<Args>()..., '\0'};

  static void call(void** slots) {
    int at = 0;
    const auto next = [&]<class T>(T*) { return *reinterpret_cast<T*>(slots[at++]); };
    std::tuple<Args...> values{next((Args*)nullptr)...};
    std::apply(kKernel, values);
  }
};

struct Listed {
  const char *name, *signature;
  void (*call)(void**);
  int bound;  // most threads, the first argument of __launch_bounds__
};

constexpr int first_of(int threads, int = 0, int = 0) { return threads; }

inline const Listed* find(const Listed* list, int count, const char* name) {
  for (int i = 0; i < count; ++i)
    if (!std::strcmp(list[i].name, name)) return &list[i];
  return nullptr;
}

QMIR_STATE unsigned char signal_stack[65536];

// What the operating system does with bad accesses, put back at the end.
struct Traps {
  static constexpr int kNumbers[] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction before[3];
  stack_t stack_before;

  Traps() {
    const stack_t stack{.ss_sp = signal_stack, .ss_flags = 0, .ss_size = sizeof signal_stack};
    sigaltstack(&stack, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; ++i) sigaction(kNumbers[i], &action, &before[i]);
  }

  ~Traps() {
    for (int i = 0; i < 3; ++i) sigaction(kNumbers[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

// Blocks in an order drawn from the seed, one at a time.
inline void run_grid(size_t dynamic_shared) {
  const uint64_t blocks = (uint64_t)gridDim.x * gridDim.y * gridDim.z;
  std::vector<uint32_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t j = machine.random.next() % (i + 1);
    order[i] = order[j];
    order[j] = (uint32_t)i;
  }
  for (const uint32_t block : order)
    run_block({block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y},
              dynamic_shared);
}

inline bool launch(const Listed& kernel, const unsigned* sizes, size_t shared, uint64_t seed,
                   void** slots) {
  gridDim = {sizes[0], sizes[1], sizes[2]};
  blockDim = {sizes[3], sizes[4], sizes[5]};
  machine.random.state = seed;
  machine.policy = (int)(seed % 3);
  machine.kernel = kernel.call;
  machine.arguments = slots;
  machine.failed = false;
  machine.dynamic_shared = allocate(shared, 0, true).data;
  const Traps traps;
  if (sigsetjmp(machine.escape, 1) == 0) run_grid(shared);
  return !machine.failed;
}

}  // namespace qmir_host

#define QMIR_EXPORT extern "C" __attribute__((visibility("default")))

// A guarded copy of `bytes` from `from`; freed by qmir_host_reset.
QMIR_EXPORT void* qmir_host_buffer(const void* from, size_t bytes, int at_end) {
  unsigned char* data = qmir_host::allocate(bytes, (uintptr_t)from % 16, at_end != 0).data;
  std::memcpy(data, from, bytes);
  return data;
}

// Number of the first buffer around which something was written, or -1; the distance goes to *by.
QMIR_EXPORT long long qmir_host_touched(long long* by) {
  const auto& all = qmir_host::regions();
  for (size_t i = 0; i < all.size(); ++i)
    if ((*by = qmir_host::touched(all[i]))) return (long long)i;
  return -1;
}

QMIR_EXPORT void* qmir_host_stacks() { return qmir_host::new_stacks(); }

QMIR_EXPORT void qmir_host_reset() {
  for (auto& region : qmir_host::regions()) qmir_host::release(region);
  qmir_host::regions().clear();
}

// `list` is a table of Listed; the functions look kernels up in it.
#define QMIR_HOST_EXPORT(list)                                                                    \
  QMIR_EXPORT const char* qmir_host_signature(const char* name) {                                 \
    const auto* found = qmir_host::find(list, sizeof list / sizeof *list, name);                  \
    return found ? found->signature : nullptr;                                                    \
  }                                                                                               \
  QMIR_EXPORT int qmir_host_bound(const char* name) {                                             \
    return qmir_host::find(list, sizeof list / sizeof *list, name)->bound;                        \
  }                                                                                               \
  QMIR_EXPORT const char* qmir_host_launch(const char* name, const unsigned* sizes, size_t shared, \
                                           uint64_t seed, void** slots, void* stacks) {           \
    qmir_host::all_stacks = static_cast<unsigned char*>(stacks);                                  \
    const auto* found = qmir_host::find(list, sizeof list / sizeof *list, name);                  \
    const bool good = qmir_host::launch(*found, sizes, shared, seed, slots);                      \
    return good ? nullptr : qmir_host::machine.error;                                             \
  }
