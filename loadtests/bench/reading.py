"""What is read off one load."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """One contender in one round at one number of connections."""

    requests_s: float
    p50_us: float
    p99_us: float
    cpu_us: float
    """Of all its processes, user and system, a request."""
    resident_mib: float
    redis_us: float = 0.0
    """Of the feature store's processor time, a request."""
