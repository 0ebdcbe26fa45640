"""Lets rows of many callers share one execution of a backend."""
