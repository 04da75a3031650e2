// A library with thread-local data, for large_tls.
namespace {
thread_local int calls = 0;
}  // namespace

extern "C" __attribute__((visibility("default"))) int CountCalls() { return ++calls; }
