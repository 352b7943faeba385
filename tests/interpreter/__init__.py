"""A package, so that files of one name in two folders are two modules."""
