// One block of threads: each is a fiber that runs until it waits at a barrier or in a warp
// collective. Which one runs next is drawn from a seed, so that code which relies on an order that
// CUDA does not promise fails for some seed.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdarg>

#include "language.h"
#include "memory.h"

// The linker's names for where .bss begins and ends.
extern "C" unsigned char __bss_start[] __attribute__((visibility("hidden")));
extern "C" unsigned char _end[] __attribute__((visibility("hidden")));

namespace qmir_host {

enum class State { ready, barrier, collective, done };

struct Place {
  const char* file;
  int line;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Thread {
  Context context;
  State state;
  uint3 index;
  Place place;
  // Of the barrier or the collective that it waits in.
  const char* kind;
  unsigned mask;
  int vote;
  alignas(16) unsigned char in[64], out[32];
  std::vector<std::vector<Copy>> copies;  // groups; the last one is open
};

struct Random {
  uint64_t state;

  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  int below(int count) { return (int)(next() % (uint64_t)count); }
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<int> ready;
  int current = 0, live = 0, waiting = 0, policy = 0;
  Context scheduler;
  Random random{0};
  void (*kernel)(void**) = nullptr;
  void** arguments = nullptr;
  unsigned char* dynamic_shared = nullptr;
  bool failed = false, inside = false;
  char error[1024] = {};
  sigjmp_buf escape;
};

QMIR_STATE Machine machine;

inline Thread& self() { return machine.threads[machine.current]; }

inline void locate(char* text, size_t size) {
  const uint3& t = threadIdx;
  std::snprintf(text, size, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y,
                blockIdx.z, t.x, t.y, t.z);
}

// Leaves the kernel for good; the launch returns the message.
void fail(const char* format, ...) {
  machine.failed = true;
  locate(machine.error, sizeof machine.error);
  const size_t used = std::strlen(machine.error);
  va_list list;
  va_start(list, format);
  std::vsnprintf(machine.error + used, sizeof machine.error - used, format, list);
  va_end(list);
  siglongjmp(machine.escape, 1);
}

inline void on_signal(int number, siginfo_t* info, void*) {
  char what[256] = "division by zero";
  if (number != SIGFPE) describe(static_cast<unsigned char*>(info->si_addr), what, sizeof what);
  fail("%s", what);
}

inline void make_ready(int index) {
  machine.threads[index].state = State::ready;
  machine.ready.push_back(index);
}

inline void wait_here() {
  Thread& me = self();
  switch_to(me.context, machine.scheduler);
  threadIdx = self().index;
}

// Lets the block go on once every thread that has not ended is here.
inline void release_barrier() {
  if (machine.waiting == 0 || machine.waiting < machine.live) return;
  const Thread* first = nullptr;
  int votes = 0;
  for (Thread& t : machine.threads) {
    if (t.state != State::barrier) continue;
    if (!first) first = &t;
    if (t.place.line != first->place.line || t.kind != first->kind)
      fail("divergent barrier: some threads wait in %s at line %d, others in %s at line %d",
           first->kind, first->place.line, t.kind, t.place.line);
    votes += t.vote != 0;
  }
  machine.waiting = 0;
  for (int i = 0; i < (int)machine.threads.size(); ++i)
    if (machine.threads[i].state == State::barrier) {
      machine.threads[i].vote = votes;
      make_ready(i);
    }
}

inline int barrier(const char* kind, int vote, Place place) {
  Thread& me = self();
  me.state = State::barrier;
  me.kind = kind;
  me.vote = vote;
  me.place = place;
  ++machine.waiting;
  release_barrier();
  wait_here();
  return self().vote;
}

inline int lane() { return machine.current % 32; }

// Waits for the lanes of `mask`; the last one to come lets `combine(lanes)` fill every lane's
// result, where lanes[i] is null for a lane outside of the mask.
template <class In, class Out, class Combine>
Out collective(const char* kind, unsigned mask, const In& in, Place place, const Combine& combine) {
  static_assert(sizeof(In) <= sizeof(Thread::in) && sizeof(Out) <= sizeof(Thread::out));
  Thread& me = self();
  me.state = State::collective;
  me.kind = kind;
  me.mask = mask;
  me.place = place;
  std::memcpy(me.in, &in, sizeof in);
  if (!(mask >> lane() & 1))
    fail("%s at line %d: lane %d is not in its own mask %08x", kind, place.line, lane(), mask);
  const int first = machine.current - lane();
  Thread* lanes[32] = {};
  bool complete = true;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const int index = first + i;
    if (index >= (int)machine.threads.size() || machine.threads[index].state == State::done)
      fail("%s at line %d: lane %d of the mask %08x %s", kind, place.line, i, mask,
           index >= (int)machine.threads.size() ? "does not exist" : "has ended");
    Thread& other = machine.threads[index];
    lanes[i] = &other;
    if (other.state != State::collective) {
      complete = false;
    } else if (other.mask != mask || other.kind != kind) {
      fail("%s at line %d with mask %08x meets %s at line %d with mask %08x", kind, place.line,
           mask, other.kind, other.place.line, other.mask);
    }
  }
  if (complete) {
    combine(lanes);
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) make_ready(first + i);
  }
  wait_here();
  Out out;
  std::memcpy(&out, self().out, sizeof out);
  return out;
}

template <class T>
const T& input(const Thread* t) {
  return *reinterpret_cast<const T*>(t->in);
}

template <class T>
void answer(Thread* t, const T& value) {
  std::memcpy(t->out, &value, sizeof value);
}

inline void thread_entry() {
  threadIdx = self().index;
  machine.kernel(machine.arguments);
  self().state = State::done;
  --machine.live;
  release_barrier();
  wait_here();
}

// Which of the ready threads goes on: any one; one of the warp that ran last, so that warps drift
// apart as far as barriers let them; or the last of the block.
inline int choose() {
  auto& ready = machine.ready;
  int at = machine.random.below((int)ready.size());
  if (machine.policy == 1) {
    for (int i = 0; i < (int)ready.size(); ++i) {
      const int probe = (at + i) % (int)ready.size();
      if (ready[probe] / 32 == machine.current / 32) {
        at = probe;
        break;
      }
    }
  } else if (machine.policy == 2) {
    at = (int)(std::max_element(ready.begin(), ready.end()) - ready.begin());
  }
  const int chosen = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return chosen;
}

inline void report_deadlock() {
  char text[768] = {};
  size_t used = 0;
  const Thread* last = nullptr;
  for (const Thread& t : machine.threads) {
    if (t.state == State::done) continue;
    if (last && t.kind == last->kind && t.place.line == last->place.line) continue;
    last = &t;
    used += std::snprintf(text + used, sizeof text - used, "; from thread (%u, %u, %u) on in %s at line %d",
                          t.index.x, t.index.y, t.index.z, t.kind, t.place.line);
    if (used > sizeof text - 100) break;
  }
  fail("deadlock: the threads wait for each other%s", text);
}

__attribute__((no_sanitize("undefined"))) inline void poison_shared(size_t dynamic, bool integers) {
  // As floats NaN; as integers -1 or the largest.
  const unsigned pattern = integers ? 0x7fffffffu : 0xffffffffu;
  const auto fill = [&](unsigned char* from, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) from[i] = (unsigned char)(pattern >> (8 * (i % 4)));
  };
  fill(__bss_start, _end - __bss_start);
  if (dynamic) fill(machine.dynamic_shared, dynamic);
}

inline void run_block(uint3 index, size_t dynamic_shared) {
  blockIdx = index;
  const int count = (int)(blockDim.x * blockDim.y * blockDim.z);
  machine.threads.resize(count);
  machine.ready.clear();
  machine.live = count;
  machine.waiting = machine.current = 0;
  poison_shared(dynamic_shared, machine.random.next() & 1);
  for (int i = 0; i < count; ++i) {
    Thread& t = machine.threads[i];
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    t.copies.assign(1, {});
    prepare(t.context, stack_of(i), thread_entry);
    make_ready(i);
  }
  while (machine.live > 0) {
    if (machine.ready.empty()) report_deadlock();
    machine.current = choose();
    switch_to(machine.scheduler, self().context);
  }
}

}  // namespace qmir_host
