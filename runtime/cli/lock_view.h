// Who waits for whom: the range locks of a running process, from outside.
//
// Requests live on the stacks of threads that come and go while they are read. One is believed if its fields make sense,
// among them the priority in the tree, which is a hash of its ticket, and if it reads the same twice; what is not
// believed is left out, with what hangs below it.
#ifndef FREEHOLD_RUNTIME_CLI_LOCK_VIEW_H_
#define FREEHOLD_RUNTIME_CLI_LOCK_VIEW_H_

#include <vector>

#include "absl/status/statusor.h"
#include "runtime/cli/process_view.h"
#include "vm/sync/range_request.h"

namespace freehold::cli {

struct LockWait {
  vm::sync::HolderInfo waiter;
  // An older request that conflicts with it: one that is held if there is one. Thread 0: not known.
  vm::sync::HolderInfo behind;
};

// Those who wait at about this moment, at most a few hundred, the one who waits longest first. Errors: the process has
// ended; it runs another build.
absl::StatusOr<std::vector<LockWait>> ReadLockWaits(const ProcessView& process);

}  // namespace freehold::cli

#endif  // FREEHOLD_RUNTIME_CLI_LOCK_VIEW_H_
