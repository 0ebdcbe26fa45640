"""What candidates would have said: they are shown what the champion answered, and answer nobody."""
