#include "bench/support/mmap_lock_trace.h"

#include <fcntl.h>
#include <mntent.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "bench/support/kernel_memory.h"

namespace freehold::bench {
namespace {

constexpr char kEvent[] = "events/mmap_lock/mmap_lock_acquire_returned/";
constexpr std::size_t kExcerptLines = 8;

// Where tracefs is mounted; empty if it is not.
std::string MountedTracefs() {
  FILE* mounts = setmntent("/proc/self/mounts", "r");
  if (mounts == nullptr) return "";
  std::string where;
  while (const mntent* entry = getmntent(mounts)) {
    if (std::strcmp(entry->mnt_type, "tracefs") != 0) continue;
    where = entry->mnt_dir;
    break;
  }
  endmntent(mounts);
  return where;
}

int OpenFolder(const std::string& path) { return open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC); }

// A mount that ends with its last descriptor: it is taken out of the tree at once.
int OpenInstancesOfOwnMount() {
  char folder[] = "/tmp/freehold-tracefs-XXXXXX";
  if (mkdtemp(folder) == nullptr) return -1;
  int instances = -1;
  if (mount("freehold", folder, "tracefs", 0, nullptr) == 0) {
    instances = OpenFolder(absl::StrCat(folder, "/instances"));
    const int error = errno;
    umount2(folder, MNT_DETACH);
    errno = error;
  }
  const int error = errno;
  rmdir(folder);
  errno = error;
  return instances;
}

std::string ReadAll(int file) {
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(file, part, sizeof(part))) > 0;) text.append(part, static_cast<std::size_t>(n));
  return text;
}

}  // namespace

std::unique_ptr<MmapLockTrace> MmapLockTrace::Create(std::string& reason) {
  const std::string mounted = MountedTracefs();
  const int instances = mounted.empty() ? OpenInstancesOfOwnMount() : OpenFolder(absl::StrCat(mounted, "/instances"));
  if (instances < 0) {
    reason = absl::StrCat("no access to tracefs (", std::strerror(errno), "); it takes root");
    return nullptr;
  }
  std::string name = absl::StrCat("freehold-", getpid());
  if (mkdirat(instances, name.c_str(), 0700) != 0) {
    reason = absl::StrCat("no instance of tracefs (", std::strerror(errno), "); it takes root");
    close(instances);
    return nullptr;
  }
  std::unique_ptr<MmapLockTrace> trace(new MmapLockTrace(instances, std::move(name)));
  if (!trace->Write("tracing_on", "0") || !trace->Write("options/event-fork", "1") ||
      !trace->Write(absl::StrCat(kEvent, "filter"), "write==1 && success==1")) {
    reason = "this kernel has no tracepoints for mmap_lock";
    return nullptr;
  }
  return trace;
}

MmapLockTrace::~MmapLockTrace() {
  (void)Write(absl::StrCat(kEvent, "enable"), "0");
  unlinkat(instances_, name_.c_str(), AT_REMOVEDIR);
  close(instances_);
}

void MmapLockTrace::Follow(pid_t process) {
  MustWrite("set_event_pid", absl::StrCat(process));
  MustWrite(absl::StrCat(kEvent, "enable"), "1");
}

void MmapLockTrace::Start() {
  MustWrite("trace", "");  // opened to be truncated, it is emptied
  MustWrite("tracing_on", "1");
}

void MmapLockTrace::Stop() { MustWrite("tracing_on", "0"); }

// What each processor's buffer holds, and what was overwritten there.
std::uint64_t MmapLockTrace::WriteAcquisitions() const {
  std::uint64_t sum = 0;
  const long processors = sysconf(_SC_NPROCESSORS_CONF);
  for (long i = 0; i < processors; ++i) {
    for (const absl::string_view line : absl::StrSplit(Read(absl::StrCat("per_cpu/cpu", i, "/stats")), '\n')) {
      const std::pair<absl::string_view, absl::string_view> field = absl::StrSplit(line, absl::MaxSplits(": ", 1));
      if (field.first != "entries" && field.first != "overrun" && field.first != "dropped events") continue;
      std::uint64_t count = 0;
      if (absl::SimpleAtoi(field.second, &count)) sum += count;
    }
  }
  return sum;
}

std::string MmapLockTrace::Excerpt() const {
  std::string excerpt;
  std::size_t lines = 0;
  for (const absl::string_view line : absl::StrSplit(Read("trace"), '\n', absl::SkipEmpty())) {
    if (line.front() == '#') continue;
    if (++lines > kExcerptLines) break;
    absl::StrAppend(&excerpt, line, "\n");
  }
  return excerpt;
}

bool MmapLockTrace::Write(const std::string& file, const std::string& text) const {
  const int descriptor = openat(instances_, absl::StrCat(name_, "/", file).c_str(), O_WRONLY | O_TRUNC | O_CLOEXEC);
  if (descriptor < 0) return false;
  const bool written = write(descriptor, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  return close(descriptor) == 0 && written;
}

void MmapLockTrace::MustWrite(const std::string& file, const std::string& text) const {
  if (!Write(file, text)) DieOfErrno(file.c_str());
}

std::string MmapLockTrace::Read(const std::string& file) const {
  const int descriptor = openat(instances_, absl::StrCat(name_, "/", file).c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) DieOfErrno(file.c_str());
  std::string text = ReadAll(descriptor);
  close(descriptor);
  return text;
}

}  // namespace freehold::bench
