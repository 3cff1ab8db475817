"""In the notebook's (or the command line's) process: a run, what is known of it, and who is told."""
