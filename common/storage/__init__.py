"""The object store and where things lie in it."""
