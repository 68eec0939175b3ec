"""muxrt: several LLaMAs behind one endpoint, on accelerators that they share."""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).parent.parent
if (_checkout / "kernels" / "__init__.py").is_file():  # a checkout: kernels/ lies beside muxrt/
    __path__.append(str(_checkout))
