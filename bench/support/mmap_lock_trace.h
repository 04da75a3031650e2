// Counts how often a process takes the kernel's mmap_lock for writing, by the kernel's own tracepoint
// (mmap_lock:mmap_lock_acquire_returned). An instance of tracefs of its own: others who trace are not disturbed.
//
// Needs root and a kernel with the tracepoint; tracefs is mounted if nobody has done so, where only this process sees
// it. Nothing stays behind, but for an instance that traces nobody if the process is killed.
//
// Thread safety: thread-compatible.
// Errors:        Create's are told to the user; afterwards, as elsewhere here, what fails ends the program.
#ifndef FREEHOLD_BENCH_SUPPORT_MMAP_LOCK_TRACE_H_
#define FREEHOLD_BENCH_SUPPORT_MMAP_LOCK_TRACE_H_

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>

namespace freehold::bench {

class MmapLockTrace {
 public:
  // Null if this cannot be traced here; `reason` says why.
  static std::unique_ptr<MmapLockTrace> Create(std::string& reason);
  ~MmapLockTrace();
  MmapLockTrace(const MmapLockTrace&) = delete;
  MmapLockTrace& operator=(const MmapLockTrace&) = delete;

  // From now on `process` is traced, with every thread and process that it makes; nobody else any more.
  void Follow(pid_t process);
  // Counts from zero until Stop.
  void Start();
  void Stop();
  // By the threads that are followed, since Start.
  std::uint64_t WriteAcquisitions() const;
  // Some of them, a line each: who and when.
  std::string Excerpt() const;

 private:
  explicit MmapLockTrace(int instances, std::string name) : instances_(instances), name_(std::move(name)) {}

  bool Write(const std::string& file, const std::string& text) const;
  void MustWrite(const std::string& file, const std::string& text) const;
  std::string Read(const std::string& file) const;

  const int instances_;     // descriptor of tracefs' folder of instances
  const std::string name_;  // of ours
};

}  // namespace freehold::bench

#endif  // FREEHOLD_BENCH_SUPPORT_MMAP_LOCK_TRACE_H_
