"""A text that is read from left to right, and errors that point into it."""

from __future__ import annotations

import re

from fxexpand.errors import RuleError

# How much of a long line an error shows on each side of the place.
_AROUND = 60


class Scanner:
    """``text``, read up to ``at``. White space between tokens, line breaks too, is skipped."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self, pattern: str | re.Pattern[str]) -> str:
        """What comes next, if it fits ``pattern``; otherwise nothing, ``""``."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        found = re.compile(pattern).match(self.text, self.at)
        return "" if found is None else found[0]

    def take(self, pattern: str | re.Pattern[str]) -> str:
        """The same, and reads on behind it."""
        found = self.peek(pattern)
        self.at += len(found)
        return found

    def here(self) -> int:
        """Where the next token begins."""
        self.peek("")
        return self.at

    def found(self) -> str:
        """The next token, as an error names it."""
        return repr(self.peek(r"\w+|.")) if self.peek(".") else "the end"

    def error(self, message: str, at: int | None = None) -> RuleError:
        """What is wrong at a place, the next token by default, with the line and a caret under the place."""
        at = self.here() if at is None else at
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        line, column = self.text[start : len(self.text) if end < 0 else end], at - start
        row = f"line {self.text.count(chr(10), 0, at) + 1}, " if "\n" in self.text.rstrip() else ""
        left = max(0, column - _AROUND) if len(line) > 2 * _AROUND else 0
        shown = line[left : column + _AROUND] if len(line) > 2 * _AROUND else line
        before = "".join(sign if sign == "\t" else " " for sign in line[left:column])
        return RuleError(f"rules, {row}column {column + 1}: {message}\n    {shown}\n    {before}^")
