"""The version, which archives carry."""

__version__ = "0.1.0"
