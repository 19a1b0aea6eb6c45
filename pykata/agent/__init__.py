"""The agent in the guest, seen from the host."""
