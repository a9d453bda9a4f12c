"""The version of the library."""

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """The version of the installed fxexpand; "not installed" when it is imported from a bare source tree."""
    try:
        return version("fxexpand")
    except PackageNotFoundError:
        return "not installed"
