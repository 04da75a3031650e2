// The memory that the control groups of this process leave it, by version 2 of their interface and by version 1.
//
// Read inside the process's first malloc: nothing here allocates.
#ifndef FREEHOLD_RUNTIME_CGROUP_H_
#define FREEHOLD_RUNTIME_CGROUP_H_

#include "vm/units.h"

namespace freehold::runtime {

inline constexpr vm::Bytes kNoCgroupLimit = {SIZE_MAX};

// The tightest of the process's group and all groups above it.
struct CgroupLimits {
  vm::Bytes max = kNoCgroupLimit;   // memory.max, memory.limit_in_bytes: beyond it the kernel kills
  vm::Bytes high = kNoCgroupLimit;  // memory.high: beyond it the kernel throttles
};

// Where the kernel tells: other places for tests.
struct CgroupPaths {
  const char* membership = "/proc/self/cgroup";
  const char* root = "/sys/fs/cgroup";
};

// What cannot be read limits nothing. A container may see its own group as the root and not know it by its path: of a
// path, those directories count that are there.
CgroupLimits ReadCgroupLimits(const CgroupPaths& paths = {});

// What Freehold's limits are by default: an eighth less than the kernel begins to throttle or kill at, for the soft
// one, and a sixteenth less than it kills at for the hard one, since stacks, libraries and the kernel's own memory
// count too. 0: none.
vm::Bytes SoftLimitFor(const CgroupLimits& limits);
vm::Bytes HardLimitFor(const CgroupLimits& limits);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_CGROUP_H_
