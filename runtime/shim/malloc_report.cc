// malloc_trim, mallinfo, mallinfo2, malloc_info, malloc_stats and mallopt: glibc's control and
// reports, over the heap's own numbers. README.md has the table of what each number stands for.
#include "runtime/shim/malloc_report.h"

#include <malloc.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstdio>

#include "allocator/heap_stats.h"
#include "runtime/message.h"
#include "runtime/runtime.h"
#include "runtime/shim/export.h"
#include "runtime/shim/libc_malloc.h"
#include "runtime/thread.h"
#include "vm/address_space.h"
#include "vm/os/thread_id.h"

namespace freehold::runtime::shim {
namespace {

using allocator::HeapStats;
using allocator::SizeClassStats;

// Null if Freehold serves. Waits while another thread looks the functions up.
const LibcMalloc* Libc() {
  if (process_runtime.EnsureStarted() != Server::kLibc) return nullptr;
  const LibcMalloc* libc = nullptr;
  while ((libc = LibcMalloc::Get()) == nullptr) vm::os::YieldCpu();
  return libc;
}

struct mallinfo2 Mallinfo(const HeapStats& stats) {
  struct mallinfo2 info = {};
  info.arena = stats.mapped.value - stats.large.value;
  info.ordblks = stats.chunks;
  info.hblks = stats.large_objects;
  info.hblkhd = stats.large.value;
  info.uordblks = stats.allocated.value - stats.large.value;
  info.fordblks = info.arena - std::min(info.arena, info.uordblks);
  info.keepcost = stats.free_dirty.value;
  return info;
}

// Old programs' fields are ints: what does not fit is cut off at the largest.
int Narrow(std::size_t value) { return static_cast<int>(std::min<std::size_t>(value, INT_MAX)); }

struct mallinfo Narrowed(const struct mallinfo2& wide) {
  struct mallinfo info = {};
  info.arena = Narrow(wide.arena);
  info.ordblks = Narrow(wide.ordblks);
  info.hblks = Narrow(wide.hblks);
  info.hblkhd = Narrow(wide.hblkhd);
  info.uordblks = Narrow(wide.uordblks);
  info.fordblks = Narrow(wide.fordblks);
  info.keepcost = Narrow(wide.keepcost);
  return info;
}

void PrintSizeClass(void* stream, const SizeClassStats& stats) {
  if (stats.spans == 0) return;
  std::fprintf(static_cast<std::FILE*>(stream),
               "<size from=\"%zu\" to=\"%zu\" total=\"%zu\" count=\"%llu\"/>\n", stats.object_size,
               stats.object_size, stats.object_size * stats.allocated,
               static_cast<unsigned long long>(stats.allocated));
}

// The elements that tools written for glibc's document look for.
void PrintXml(std::FILE* stream) {
  allocator::ObjectHeap& heap = process_runtime.heap();
  const HeapStats stats = heap.Stats();
  const struct mallinfo2 info = Mallinfo(stats);
  const vm::AddressSpaceStats space = process_runtime.space().Stats();
  std::fputs("<malloc version=\"1\">\n<heap nr=\"0\">\n<sizes>\n", stream);
  heap.ForEachSizeClass(PrintSizeClass, stream);
  std::fprintf(stream,
               "</sizes>\n"
               "<total type=\"fast\" count=\"0\" size=\"0\"/>\n"
               "<total type=\"rest\" count=\"%zu\" size=\"%zu\"/>\n"
               "<system type=\"current\" size=\"%zu\"/>\n"
               "<aspace type=\"total\" size=\"%zu\"/>\n"
               "</heap>\n",
               info.ordblks, info.fordblks, info.arena, space.reserved.value);
  std::fprintf(stream,
               "<total type=\"fast\" count=\"0\" size=\"0\"/>\n"
               "<total type=\"rest\" count=\"%zu\" size=\"%zu\"/>\n"
               "<total type=\"mmap\" count=\"%zu\" size=\"%zu\"/>\n"
               "<system type=\"current\" size=\"%zu\"/>\n"
               "<aspace type=\"total\" size=\"%zu\"/>\n"
               "</malloc>\n",
               info.ordblks, info.fordblks, info.hblks, info.hblkhd, stats.mapped.value,
               space.reserved.value);
}

void AppendLine(Message& message, std::string_view name, std::uint64_t value) {
  message.Append(name).Append(" = ").AppendNumber(value).Append('\n');
}

void PrintStats() {
  const HeapStats heap = process_runtime.heap().Stats();
  const vm::AddressSpaceStats space = process_runtime.space().Stats();
  Message message;
  message.Append("Freehold\n");
  AppendLine(message, "allocated bytes       ", heap.allocated.value);
  AppendLine(message, "  of large objects    ", heap.large.value);
  AppendLine(message, "active bytes          ", heap.active.value);
  AppendLine(message, "free bytes, resident  ", heap.free_dirty.value);
  AppendLine(message, "free bytes, given back", heap.free_clean.value);
  AppendLine(message, "metadata bytes        ", heap.metadata.value);
  AppendLine(message, "large objects         ", heap.large_objects);
  AppendLine(message, "threads               ", heap.threads);
  AppendLine(message, "space: reserved bytes ", space.reserved.value);
  AppendLine(message, "  committed bytes     ", space.committed.value);
  AppendLine(message, "  mapped bytes        ", space.mapped.value);
  AppendLine(message, "  free, resident      ", space.free_resident.value);
  AppendLine(message, "  mappings            ", space.vmas);
  AppendLine(message, "  maps                ", space.maps);
  AppendLine(message, "  unmaps              ", space.unmaps);
  AppendLine(message, "  pages given back    ", space.purged_pages);
  message.Write();
}

}  // namespace

void ReportAtExit() {
  if (process_runtime.server() == Server::kFreehold && process_runtime.config().stats_at_exit)
    PrintStats();
}

}  // namespace freehold::runtime::shim

namespace runtime = freehold::runtime;
namespace shim = freehold::runtime::shim;

extern "C" {

// Gives back all free memory, but for what other threads have at hand. `pad`, what glibc would keep at the end of its
// heap, has no meaning here.
FREEHOLD_EXPORT int malloc_trim(std::size_t pad) noexcept {
  if (const auto* libc = shim::Libc()) return libc->malloc_trim(pad);
  const std::size_t given_back = runtime::process_runtime.heap().Trim(runtime::CurrentThreadCache());
  const freehold::vm::Pages purged =
      runtime::process_runtime.space().Purge(freehold::vm::PurgeScope::kAll);
  return given_back + purged.value > 0 ? 1 : 0;
}

FREEHOLD_EXPORT struct mallinfo2 mallinfo2() noexcept {
  if (const auto* libc = shim::Libc())
    return libc->mallinfo2 != nullptr ? libc->mallinfo2() : (struct mallinfo2){};
  return shim::Mallinfo(runtime::process_runtime.heap().Stats());
}

FREEHOLD_EXPORT struct mallinfo mallinfo() noexcept {
  if (const auto* libc = shim::Libc()) return libc->mallinfo();
  return shim::Narrowed(shim::Mallinfo(runtime::process_runtime.heap().Stats()));
}

// As glibc's: the error is the result.
FREEHOLD_EXPORT int malloc_info(int options, std::FILE* stream) noexcept {
  if (const auto* libc = shim::Libc()) return libc->malloc_info(options, stream);
  if (options != 0) return EINVAL;
  shim::PrintXml(stream);
  return 0;
}

FREEHOLD_EXPORT void malloc_stats() noexcept {
  if (const auto* libc = shim::Libc()) return libc->malloc_stats();
  shim::PrintStats();
}

// The parameters tune glibc's bins and arenas. They are hints, so ignoring them is success.
FREEHOLD_EXPORT int mallopt(int parameter, int value) noexcept {
  if (const auto* libc = shim::Libc()) return libc->mallopt(parameter, value);
  return 1;
}

}  // extern "C"
