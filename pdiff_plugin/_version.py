"""The version, by itself so that every module can know it without importing the package's front."""

__version__ = "0.1.0.dev0"
