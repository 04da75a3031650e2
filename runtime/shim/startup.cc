#include "runtime/shim/startup.h"

#include "runtime/fork.h"
#include "runtime/guard_report.h"
#include "runtime/heap_profile_file.h"
#include "runtime/keeper.h"
#include "runtime/message.h"
#include "runtime/runtime.h"
#include "runtime/shim/malloc_report.h"

// Of libmimalloc.so, where that is in the process.
extern "C" int mi_version(void) __attribute__((weak));

namespace freehold::runtime::shim {
namespace {

// After the program's atexit handlers and destructors: libc runs those of a library it loaded early
// late.
__attribute__((destructor)) void OnProcessExit() {
  ReportAtExit();
  FinishHeapProfile();
}

}  // namespace

void OnProcessStart(const char* const* environment) {
  process_runtime.EnsureStarted(environment);
  if (process_runtime.config().malloc == MallocChoice::kMimalloc && &mi_version == nullptr) {
    Message().Append("libmimalloc.so is not preloaded; libc serves malloc instead").Report();
  }
  StartHeapProfile();
  StartGuardReports();
  if (!process_runtime.has_space()) return;
  process_keeper.PrepareToStart();
  RegisterForkHandlers();
}

}  // namespace freehold::runtime::shim
