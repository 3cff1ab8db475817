"""A run on one page: what is read out of its state, and that as HTML and as plain text. All of it pure."""
