"""The guest bundle: kernel and initrd."""
