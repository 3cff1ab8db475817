"""What both strategies on XLA share."""
