"""The training loop in progress: its windows, steps, clocks and requests, and the checks that watch its first steps."""
