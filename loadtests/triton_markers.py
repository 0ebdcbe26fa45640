"""Numbers by which a row asks the model of our test Triton for mischief, as its first number."""

RAISE = -1001
SLEEP = -1002
"""For the milliseconds that the row's second number says."""
DIE = -1003
"""The process that holds the model ends."""
SHORT = -1004
"""A row less is answered."""
