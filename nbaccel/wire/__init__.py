"""Floor 1: what crosses between the notebook's process and a rank."""
