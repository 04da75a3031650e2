#include "runtime/stack_trace.h"

#include <dlfcn.h>
#include <unwind.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "runtime/runtime.h"

// The linker's: where the code of this library, or program, begins and ends.
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char etext[] __attribute__((visibility("hidden")));

namespace freehold::runtime {
namespace {

struct Walk {
  void** frames;
  unsigned most;
  unsigned count = 0;
  bool outside = false;  // a frame of the program was seen
};

// Linked into a program, Freehold's frames are the program's.
bool IsOwn(std::uintptr_t address) {
  return FramesOfMalloc() != 0 && address - reinterpret_cast<std::uintptr_t>(__ehdr_start) <=
                                          static_cast<std::uintptr_t>(etext - __ehdr_start);
}

// An address within operator new; past its start, since readers take one off a return address. malloc itself has
// several names, of which readers see one that they do not know.
void* MallocFrame() {
  constexpr void* (*kEntry)(std::size_t) = &::operator new;
  return reinterpret_cast<char*>(kEntry) + 1;
}

// Programs that are linked statically register their unwind tables in their first constructor. Until then the unwinder
// would stop the program, since it does not find its own frame.
bool HasUnwindTables() {
  static constinit std::atomic<bool> seen{false};
  if (seen.load(std::memory_order_relaxed)) return true;
  const bool found = _Unwind_FindEnclosingFunction(reinterpret_cast<char*>(&CaptureStack) + 1) != nullptr;
  if (found) seen.store(true, std::memory_order_relaxed);
  return found;
}

_Unwind_Reason_Code Visit(_Unwind_Context* context, void* to) {
  Walk& walk = *static_cast<Walk*>(to);
  std::uintptr_t address = _Unwind_GetIP(context);
  if (address == 0) return _URC_END_OF_STACK;
  if (!walk.outside && IsOwn(address)) {
    walk.frames[0] = MallocFrame();
    walk.count = 1;
    return _URC_NO_REASON;
  }
  walk.outside = true;
  if (walk.count == walk.most) return _URC_END_OF_STACK;
  walk.frames[walk.count++] = reinterpret_cast<void*>(address);
  return _URC_NO_REASON;
}

}  // namespace

unsigned FramesOfMalloc() { return &has_mmap_shim != nullptr ? 1 : 0; }

unsigned CaptureStack(void** frames, unsigned most) {
  Walk walk = {.frames = frames, .most = most};
  if (most == 0) return 0;
  if (HasUnwindTables()) _Unwind_Backtrace(Visit, &walk);
  if (walk.count == 0) frames[walk.count++] = MallocFrame();
  return walk.count;
}

void AppendFrame(const void* address, Message& line) {
  // The call, not what comes after it.
  const void* call = static_cast<const char*>(address) - 1;
  line.Append("    ").AppendHex(reinterpret_cast<std::uintptr_t>(address));
  Dl_info info;
  if (dladdr(call, &info) == 0 || info.dli_fname == nullptr) return;
  const auto offset_from = [&](const void* base) {
    return static_cast<std::uint64_t>(static_cast<const char*>(address) - static_cast<const char*>(base));
  };
  if (info.dli_sname != nullptr) line.Append(' ').Append(info.dli_sname).Append('+').AppendHex(offset_from(info.dli_saddr));
  line.Append(" (").Append(info.dli_fname).Append('+').AppendHex(offset_from(info.dli_fbase)).Append(')');
}

}  // namespace freehold::runtime
