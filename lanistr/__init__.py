"""LANISTR: pretraining on language, image and structured data in which most samples miss something."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lanistr.model.lanistr import Lanistr
    from lanistr.predict import Predictor

__version__ = "0.1.0"
__all__ = ["Lanistr", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    """The classes, when they are first asked for: importing the package alone loads no torch."""
    if name == "Lanistr":
        from lanistr.model.lanistr import Lanistr

        return Lanistr
    if name == "Predictor":
        from lanistr.predict import Predictor

        return Predictor
    raise AttributeError(f"module 'lanistr' has no attribute {name!r}")
