"""What counts of blocks say about a candidate: pure functions, valid however often one looks."""
