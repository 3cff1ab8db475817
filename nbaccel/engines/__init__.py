"""Floor 3: how ranks come to be and end."""
