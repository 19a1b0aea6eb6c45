"""Ways to connect the guest to a network."""
