"""A file server for the FUSE of a guest's kernel, over any stream of bytes."""
