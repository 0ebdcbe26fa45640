"""The canary: which version answers whom while a release is under way, and what came of it."""
