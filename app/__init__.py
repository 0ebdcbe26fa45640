"""Hikyaku: low-latency model serving with online features."""

__version__ = "0.1.0"
