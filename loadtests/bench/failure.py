"""Why a benchmark cannot go on."""


class BenchFailure(Exception):
    """One sentence for whoever runs the benchmark."""
