-- Sends the bodies of a file, one a line, over and over, and prints what came of it as one line of
-- JSON. Arguments: the file.

local requests = {}
local next_request = 0

function init(arguments)
  local headers = { ["Content-Type"] = "application/json" }
  for body in io.lines(arguments[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, headers, body)
  end
end

function request()
  next_request = next_request % #requests + 1
  return requests[next_request]
end

function done(summary, latency)
  io.write(string.format(
    '\n{"requests": %d, "duration_s": %f, "p50_us": %f, "p99_us": %f, "refused": %d, "lost": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  ))
end
