// What malloc says about itself, beside the functions that programs call for it (malloc_report.cc).
#ifndef FREEHOLD_RUNTIME_SHIM_MALLOC_REPORT_H_
#define FREEHOLD_RUNTIME_SHIM_MALLOC_REPORT_H_

namespace freehold::runtime::shim {

// Prints malloc_stats() if FREEHOLD_STATS_AT_EXIT asks for it and Freehold serves.
void ReportAtExit();

}  // namespace freehold::runtime::shim

#endif  // FREEHOLD_RUNTIME_SHIM_MALLOC_REPORT_H_
