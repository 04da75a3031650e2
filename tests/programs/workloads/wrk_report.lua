-- One line of JSON: requests, errors, seconds, latencies in microseconds.
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "errors": %d, "seconds": %.6f, "bytes": %d, "p50": %d, "p99": %d, "p99.9": %d, "max": %d}\n',
    summary.requests, errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    summary.duration / 1e6, summary.bytes, latency:percentile(50), latency:percentile(99),
    latency:percentile(99.9), latency.max))
end
