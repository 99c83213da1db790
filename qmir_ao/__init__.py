"""qmir_ao: low-bit quantization of image-restoration networks, trained and run in integers."""

from pathlib import Path

if __name__ != "qmir_ao":  # the checkout root is on __path__ below; never import this file twice
    raise ImportError(f"import qmir_ao, not {__name__}")

__version__ = "0.1.0"

# In a checkout the folders passes/, backend/ and recipes/ lie beside this one, not in it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "passes" / "__init__.py").is_file():
    __path__.append(str(_CHECKOUT))
