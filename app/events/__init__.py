"""Tells receivers that are allowed what happened in a release: signed events, by HTTPS."""
