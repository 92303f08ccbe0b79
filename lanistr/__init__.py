"""LANISTR: pretraining on language, image and structured data in which most samples miss something."""

__version__ = "0.1.0"
