// The heap profile of this process, as files: on demand, on a signal, at the end of the process; and the report of what
// is allocated then.
//
// The format is pprof's older one, in text, which both github.com/google/pprof and the google-pprof of gperftools read:
//
//     heap profile: LIVE: BYTES [ALLOCATED: BYTES] @ heap_v2/INTERVAL
//     LIVE: BYTES [ALLOCATED: BYTES] @ ADDRESS ADDRESS ...        samples of one site
//     MAPPED_LIBRARIES:
//     ... as /proc/PID/maps has them
//
// What it counts are samples; readers scale by the interval. A site has one object size, so that this is exact.
//
// A profile is read without a lock and written without memory of malloc's. So the signal's handler writes it itself:
// also of a program that idles or hangs, and without a thread that waits for it.
#ifndef FREEHOLD_RUNTIME_HEAP_PROFILE_FILE_H_
#define FREEHOLD_RUNTIME_HEAP_PROFILE_FILE_H_

#include "runtime/config.h"
#include "vm/units.h"

namespace freehold::runtime {

// A sample so often, if settings ask for a profile and do not say.
inline constexpr vm::Bytes kDefaultProfileInterval = vm::KiB(512);

// 0: no profile.
vm::Bytes ProfileInterval(const Config& config);

// Writes the profile to an open file. 0, or an errno value: EOPNOTSUPP if there is none. Async-signal-safe.
int WriteHeapProfile(int descriptor);
// The same, to a file that is created or overwritten.
int SaveHeapProfile(const char* path);

// Handles the signal that asks for profiles, if settings name one that nobody handles. Once, at the process's start.
void StartHeapProfile();
// Writes the last profile and the report, if settings ask for them. At the process's end.
void FinishHeapProfile();

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_HEAP_PROFILE_FILE_H_
