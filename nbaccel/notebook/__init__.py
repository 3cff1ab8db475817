"""Floor 5: the notebook. The only place that knows IPython."""
