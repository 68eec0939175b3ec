"""muxrt: many LLMs of different sizes on shared accelerators, behind one endpoint."""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).parent.parent
if (_checkout / "kernels" / "__init__.py").is_file():  # a checkout: kernels/ lies beside muxrt/
    __path__.append(str(_checkout))
