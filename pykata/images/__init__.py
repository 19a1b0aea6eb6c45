"""Container images: where they are, and what is in them."""
