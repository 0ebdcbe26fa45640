"""Replays recorded requests through HTTP and holds the answers against the offline truth."""
