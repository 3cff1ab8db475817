"""Floor 5: the notebook. The only place that knows IPython."""

from nbaccel.errors import NbaccelError
from nbaccel.notebook.tracebacks import render

NbaccelError.paint = staticmethod(render)  # type: ignore[method-assign]
