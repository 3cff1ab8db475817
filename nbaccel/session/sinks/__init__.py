"""Who is told what happens in a run: text in the cell or terminal, and the run folder."""
