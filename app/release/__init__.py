"""Which version of a model serves: what workers and replicas agree on, and where it is kept."""
