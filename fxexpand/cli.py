"""The entry point of the `fxexpand` command; what it does is in `fxexpand.demo`, which needs the extra `demo`."""

import sys
from typing import TextIO

# What the extra `demo` brings, by import name. A failing import of anything else is a fault, not a missing extra.
EXTRA = frozenset({"matplotlib", "numpy", "rich", "scipy", "sklearn", "typer"})
INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit: 0, or 1 on failure, 2 on bad options, 130 on Ctrl-C. Never returns."""
    for stream in (sys.stdout, sys.stderr):
        _never_fail_on_unknown_letters(stream)
    try:
        from fxexpand.demo.command import app

        app(prog_name="fxexpand")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        _end(f'the command line needs {missing}, which is not installed. pip install "fxexpand[demo]" brings it.', 1)
    except KeyboardInterrupt:
        _end("interrupted; no half-written file is left.", INTERRUPTED)


def _end(message: str, status: int) -> None:
    sys.stderr.write(f"fxexpand: {message}\n")
    raise SystemExit(status)


def _never_fail_on_unknown_letters(stream: TextIO) -> None:
    """Let a terminal that has no × or ± show a question mark."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


if __name__ == "__main__":
    main()
