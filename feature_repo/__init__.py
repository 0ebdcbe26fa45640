"""The Feast repository of the late-flights case, and the code that builds its history."""
