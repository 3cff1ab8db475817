"""Floor 2: what runs inside a rank around the user's code."""
