"""Holds what was published against the truth: replayed requests, a training done again."""
