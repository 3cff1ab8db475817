"""`python -m nbaccel` is the command `nbaccel`."""

from nbaccel.cli.main import main

if __name__ == "__main__":
    main()
