"""Virtual machine monitors."""
