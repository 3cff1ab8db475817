"""The training core: torch on this rank; knows no notebook, session or engine."""
