"""Names that SGLang imports from here; see the package."""

from flashinfer import __getattr__

__all__ = ["__getattr__"]
