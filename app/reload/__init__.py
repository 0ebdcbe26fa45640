"""Hot reload: other versions of a model take over while requests run, and none is lost."""
