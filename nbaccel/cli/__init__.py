"""The command `nbaccel`: scripts on N ranks, configuration files, and what a user asks about both.

`main` knows the commands by name and imports one when it is called, so that `nbaccel --help` is quick.
"""
