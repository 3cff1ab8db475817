"""In the notebook's (or the command line's) process: a run, what is known of it, and who is told."""

import sys

if sys.platform == "win32":
    raise ImportError(
        "nbaccel starts its ranks with process groups and sockets that Windows lacks: use it within WSL 2, or on Linux "
        "or macOS"
    )
