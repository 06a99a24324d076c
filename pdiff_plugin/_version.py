"""The version, by itself so that every module can know it without importing the package's front."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pdiff-plugin")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
