#include "runtime/heap_profile_file.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "allocator/heap_profile.h"
#include "runtime/message.h"
#include "runtime/runtime.h"
#include "runtime/stack_trace.h"
#include "vm/os/raw_syscall.h"

namespace freehold::runtime {
namespace {

using allocator::AllocationSite;
using allocator::HeapProfile;
using vm::os::RawSyscall;
using vm::os::SyscallFailed;

// Of profiles on a signal, where settings name none.
constexpr std::string_view kDefaultPrefix = "freehold";
// Sites in the report at the end.
constexpr std::size_t kReportedSites = 100;

// Text for a file, gathered for few system calls. The first error stays.
class Writer {
 public:
  explicit Writer(int descriptor) : descriptor_(descriptor) {}

  void Append(std::string_view text) {
    if (size_ + text.size() > sizeof(text_)) Flush();
    if (text.size() > sizeof(text_)) return Write(text.data(), text.size());
    std::memcpy(text_ + size_, text.data(), text.size());
    size_ += text.size();
  }
  // An errno value.
  int Flush() {
    Write(text_, size_);
    size_ = 0;
    return error_;
  }

 private:
  void Write(const char* text, std::size_t size) {
    while (size != 0 && error_ == 0) {
      const long wrote = RawSyscall(SYS_write, descriptor_, text, size);
      if (wrote == -EINTR) continue;
      if (SyscallFailed(wrote)) {
        error_ = static_cast<int>(-wrote);
        return;
      }
      text += wrote;
      size -= static_cast<std::size_t>(wrote);
    }
  }

  const int descriptor_;
  int error_ = 0;
  std::size_t size_ = 0;
  char text_[2048];
};

const HeapProfile* Profile() {
  return process_runtime.server() == Server::kFreehold ? process_runtime.heap().profile() : nullptr;
}

struct Sums {
  std::uint64_t live = 0;
  std::uint64_t live_bytes = 0;
  std::uint64_t allocated = 0;
  std::uint64_t allocated_bytes = 0;

  void Add(const AllocationSite& site) {
    const HeapProfile::Counts counts = HeapProfile::CountsOf(site);
    live += counts.live;
    live_bytes += counts.live * site.object_size;
    allocated += counts.allocated;
    allocated_bytes += counts.allocated * site.object_size;
  }
  void AppendTo(Message& line) const {
    line.AppendNumber(live).Append(": ").AppendNumber(live_bytes).Append(" [").AppendNumber(allocated);
    line.Append(": ").AppendNumber(allocated_bytes).Append("] @");
  }
};

void AppendMaps(Writer& writer) {
  const long maps = RawSyscall(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (SyscallFailed(maps)) return;
  char chunk[1024];
  for (;;) {
    const long count = RawSyscall(SYS_read, maps, chunk, sizeof(chunk));
    if (count == -EINTR) continue;
    if (count <= 0) break;
    writer.Append({chunk, static_cast<std::size_t>(count)});
  }
  RawSyscall(SYS_close, maps);
}

int SaveNumbered() {
  static constinit std::atomic<std::uint32_t> number{0};
  const std::string_view prefix = process_runtime.config().heap_profile.text();
  Message path;
  path.Append(prefix.empty() ? kDefaultPrefix : prefix).Append('.');
  path.AppendNumber(static_cast<std::uint64_t>(RawSyscall(SYS_getpid))).Append('.');
  path.AppendNumber(number.fetch_add(1, std::memory_order_relaxed) + 1).Append(".heap").Append('\0');
  const int error = SaveHeapProfile(path.text().data());
  if (error != 0) {
    Message line;
    line.Append("cannot write the heap profile ").Append(path.text().data());
    line.Append(" (errno ").AppendNumber(static_cast<unsigned>(error)).Append(")").Report();
  }
  return error;
}

void OnSignal(int) { SaveNumbered(); }

// ---- The report ----

// Live bytes of a site, as far as samples tell.
struct Estimate {
  const AllocationSite* site;
  std::uint64_t objects;
  std::uint64_t bytes() const { return objects * site->object_size; }
};

void AppendSite(Writer& writer, const Estimate& estimate) {
  Message line;
  line.AppendNumber(estimate.bytes()).Append(" bytes in ").AppendNumber(estimate.objects);
  line.Append(estimate.objects == 1 ? " object of " : " objects of ").AppendNumber(estimate.site->object_size);
  writer.Append(line.Append(", allocated at\n").text());
  for (unsigned i = FramesOfMalloc(); i < estimate.site->depth; ++i) {
    line.Clear();
    AppendFrame(estimate.site->frames[i], line);
    writer.Append(line.Append('\n').text());
  }
}

void ReportLive(const HeapProfile& profile) {
  std::size_t count = 0;
  for (const AllocationSite* site = profile.sites(); site != nullptr; site = site->next) ++count;
  // Room for all there are; sites that come meanwhile are left out.
  const vm::Result<vm::PageRange> scratch =
      process_runtime.space().Map(vm::PagesFor({std::max<std::size_t>(count, 1) * sizeof(Estimate)}));
  if (!scratch.ok()) {
    Message().Append("no memory for the report of what is allocated").Report();
    return;
  }
  auto* estimates = reinterpret_cast<Estimate*>(scratch->address());
  std::size_t used = 0;
  std::uint64_t objects = 0;
  std::uint64_t bytes = 0;
  for (const AllocationSite* site = profile.sites(); site != nullptr && used < count; site = site->next) {
    const std::uint64_t live = HeapProfile::CountsOf(*site).live;
    if (live == 0) continue;
    const double scale = profile.ObjectsPerSample(site->object_size);
    Estimate& estimate = estimates[used++];
    estimate = {site, static_cast<std::uint64_t>(static_cast<double>(live) * scale + 0.5)};
    objects += estimate.objects;
    bytes += estimate.bytes();
  }
  std::sort(estimates, estimates + used, [](const Estimate& a, const Estimate& b) { return a.bytes() > b.bytes(); });

  Writer writer(STDERR_FILENO);
  Message line;
  line.Append("freehold: process ").AppendNumber(static_cast<std::uint64_t>(RawSyscall(SYS_getpid)));
  line.Append(" ends with ")
      .AppendNumber(bytes)
      .Append(" bytes in ")
      .AppendNumber(objects)
      .Append(" objects allocated");
  if (profile.interval().value > 1) {
    line.Append(", estimated from samples every ").AppendBytes(profile.interval());
  }
  writer.Append(line.Append('\n').text());
  const std::size_t reported = std::min(used, kReportedSites);
  for (std::size_t i = 0; i < reported; ++i) AppendSite(writer, estimates[i]);
  if (reported < used) {
    Message rest;
    rest.Append("and less at ").AppendNumber(used - reported).Append(" other places\n");
    writer.Append(rest.text());
  }
  writer.Flush();
  static_cast<void>(process_runtime.space().Unmap(*scratch));
}

}  // namespace

vm::Bytes ProfileInterval(const Config& config) {
  if (config.heap_profile_interval.value != 0) return config.heap_profile_interval;
  const bool wanted = !config.heap_profile.empty() || config.heap_profile_signal != 0 || config.leak_report;
  return wanted ? kDefaultProfileInterval : vm::Bytes{0};
}

int WriteHeapProfile(int descriptor) {
  const HeapProfile* profile = Profile();
  if (profile == nullptr) return EOPNOTSUPP;
  Writer writer(descriptor);
  Sums sums;
  for (const AllocationSite* site = profile->sites(); site != nullptr; site = site->next) sums.Add(*site);
  Message line;
  line.Append("heap profile: ");
  sums.AppendTo(line);
  line.Append(" heap_v2/").AppendNumber(profile->interval().value).Append('\n');
  writer.Append(line.text());
  for (const AllocationSite* site = profile->sites(); site != nullptr; site = site->next) {
    Sums of_site;
    of_site.Add(*site);
    line.Clear();
    of_site.AppendTo(line);
    for (const void* frame : site->stack()) line.Append(' ').AppendHex(reinterpret_cast<std::uintptr_t>(frame));
    writer.Append(line.Append('\n').text());
  }
  writer.Append("\nMAPPED_LIBRARIES:\n");
  AppendMaps(writer);
  return writer.Flush();
}

int SaveHeapProfile(const char* path) {
  if (Profile() == nullptr) return EOPNOTSUPP;
  const long file = RawSyscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (SyscallFailed(file)) return static_cast<int>(-file);
  const int error = WriteHeapProfile(static_cast<int>(file));
  const long closed = RawSyscall(SYS_close, file);
  return error != 0 ? error : SyscallFailed(closed) ? static_cast<int>(-closed) : 0;
}

void StartHeapProfile() {
  const Config& config = process_runtime.config();
  if (ProfileInterval(config).value == 0) return;
  if (Profile() == nullptr) {
    const bool served = process_runtime.server() == Server::kFreehold;
    Message().Append("no heap profile: ").Append(served ? "no memory for it" : "malloc is not Freehold's").Report();
    return;
  }
  // What the unwinder does once is done here, and not within somebody's malloc.
  void* frame;
  CaptureStack(&frame, 1);
  if (config.heap_profile_signal == 0) return;
  struct sigaction action = {};
  struct sigaction before = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  const int signal = config.heap_profile_signal;
  const int error = errno;
  const bool taken = sigaction(signal, nullptr, &before) != 0 || before.sa_handler != SIG_DFL ||
                     sigaction(signal, &action, nullptr) != 0;
  errno = error;
  if (taken) {
    Message()
        .Append("signal ")
        .AppendNumber(static_cast<unsigned>(signal))
        .Append(" cannot ask for heap profiles")
        .Report();
  }
}

void FinishHeapProfile() {
  const HeapProfile* profile = Profile();
  if (profile == nullptr) return;
  const Config& config = process_runtime.config();
  if (!config.heap_profile.empty()) SaveNumbered();
  if (config.leak_report) ReportLive(*profile);
}

}  // namespace freehold::runtime
