// Memory that tells: buffers between pages that nobody may touch, and the undefined behaviour that
// the compiler's checks find, reported with its place.
#pragma once
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "fiber.h"
#include "language.h"

namespace qmir_host {

constexpr unsigned char kFill = 0xff;  // NaN as a float, -1 as an integer

struct Region {
  unsigned char *mapped, *data;
  size_t pages, bytes;  // pages between the two that nobody may touch

  unsigned char* first() const { return mapped + kPage; }
  unsigned char* last() const { return first() + pages * kPage; }
};

QMIR_STATE std::vector<Region> all_regions;

inline std::vector<Region>& regions() { return all_regions; }

// `bytes` at an address that leaves `phase` when divided by 16, as close to the forbidden page
// behind them (at_end) or before them as that allows.
inline Region& allocate(size_t bytes, size_t phase, bool at_end) {
  const size_t pages = (bytes + 2 * 16 + kPage - 1) / kPage;
  auto* mapped = static_cast<unsigned char*>(mmap(nullptr, (pages + 2) * kPage,
                                                  PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  Region region{mapped, nullptr, pages, bytes};
  mprotect(mapped, kPage, PROT_NONE);
  mprotect(region.last(), kPage, PROT_NONE);
  std::memset(region.first(), kFill, pages * kPage);
  const size_t spare = pages * kPage - bytes;
  const size_t offset = at_end ? spare - (spare - phase) % 16 : phase;
  region.data = region.first() + offset;
  regions().push_back(region);
  return regions().back();
}

// Distance from the buffer of the first byte around it that was written, or 0.
inline long long touched(const Region& region) {
  for (unsigned char* p = region.data - 1; p >= region.first(); --p)
    if (*p != kFill) return p - region.data;
  for (unsigned char* p = region.data + region.bytes; p < region.last(); ++p)
    if (*p != kFill) return p - (region.data + region.bytes) + 1;
  return 0;
}

inline void release(Region& region) { munmap(region.mapped, (region.pages + 2) * kPage); }

// What an address that may not be touched belongs to, into `text`.
inline void describe(const unsigned char* address, char* text, size_t size) {
  for (size_t i = 0; i < regions().size(); ++i) {
    const Region& r = regions()[i];
    if (address < r.mapped || address >= r.last() + kPage) continue;
    const bool behind = address >= r.data;
    const long long distance = behind ? address - (r.data + r.bytes) : r.data - address;
    std::snprintf(text, size, "access %lld bytes %s buffer %zu of %zu bytes", distance,
                  behind ? "behind the end of" : "before", i, r.bytes);
    return;
  }
  std::snprintf(text, size, "access to an invalid address %p", (const void*)address);
}

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace qmir_host

// The compiler's checks call these (-fsanitize=undefined without its library); the first member of
// their first argument is the place in the source.
struct SourceLocation {
  const char* file;
  unsigned line, column;
};

#define QMIR_UNDEFINED(check, what)                                                        \
  extern "C" __attribute__((visibility("hidden"), noreturn)) void __ubsan_handle_##check(  \
      SourceLocation* at) {                                                                \
    qmir_host::fail(what " (%s:%u:%u)", at->file, at->line, at->column);                   \
  }

QMIR_UNDEFINED(out_of_bounds_abort, "array index out of bounds")
QMIR_UNDEFINED(type_mismatch_v1_abort, "misaligned access, or one outside of its array")
QMIR_UNDEFINED(pointer_overflow_abort, "pointer arithmetic beyond the address space")
QMIR_UNDEFINED(load_invalid_value_abort, "bool or enum with another value")
QMIR_UNDEFINED(invalid_builtin_abort, "zero for clz or ctz")
QMIR_UNDEFINED(builtin_unreachable, "unreachable code reached")
QMIR_UNDEFINED(missing_return, "function without a result")
