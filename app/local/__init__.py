"""The whole service on one machine: a Redis of its own, features, models, server."""
