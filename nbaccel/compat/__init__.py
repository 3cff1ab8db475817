"""Other libraries' names for what nbaccel does."""
