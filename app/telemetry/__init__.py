"""Every metric and the structured log."""
