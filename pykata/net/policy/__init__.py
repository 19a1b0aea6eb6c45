"""What a guest may reach, and what keeps it to that."""
