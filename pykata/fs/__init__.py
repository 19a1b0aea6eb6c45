"""Ways to bring files into the guest."""
