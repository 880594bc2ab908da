"""The version, alone in a file so that packaging and the manifest read one place."""

__version__ = "0.1.0"
