// Stacks that the threads of a block run on, and the switch between them.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "language.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace qmir_host {

constexpr size_t kStack = 64 * 1024, kPage = 4096;

#if defined(__x86_64__)

struct Context {
  void* sp = nullptr;
};

// Callee-saved registers go onto the old stack, the new one's come back.
extern "C" void switch_host_context(void** save, void* to);
asm(R"(
.pushsection .text
.hidden switch_host_context
.globl switch_host_context
.type switch_host_context, @function
switch_host_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_host_context, .-switch_host_context
.popsection
)");

inline void switch_to(Context& from, Context& to) { switch_host_context(&from.sp, to.sp); }

inline void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // keeps the stack aligned as after a call; entry never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.sp = top;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStack;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

constexpr int kMostThreads = 1024;
constexpr size_t kStride = kStack + kPage;

// Set for each launch: one memory serves all libraries of the process, which may have so many
// mappings only.
QMIR_STATE unsigned char* all_stacks;

// Memory for the stacks of a block, each above a page that nobody may touch.
inline unsigned char* new_stacks() {
  auto* stacks = static_cast<unsigned char*>(mmap(nullptr, kMostThreads * kStride,
                                                  PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                                                  0));
  for (int i = 0; i < kMostThreads; ++i) mprotect(stacks + i * kStride, kPage, PROT_NONE);
  return stacks;
}

inline unsigned char* stack_of(int index) { return all_stacks + index * kStride + kPage; }

}  // namespace qmir_host
