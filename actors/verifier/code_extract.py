"""The program in a response. Linear in its length; nothing is evaluated.

    what follows the last </think>            (a <think> that was never closed has no program)
      -> the last ``` block that is closed and tagged with a language that is asked for
         or else the last closed block without a tag, read as the first of these languages

A response that was cut within its block has no program; nor has one without a block, unless `fenced` is off: then the
whole text is the program. Knows nothing of tests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .code_languages import LANGUAGES
from .code_tests import Language
from .extract import MAX_CHARS, after_thinking

MAX_PROGRAM_CHARS = 1 << 18
_FENCE = re.compile(r"^[ \t]{0,3}(`{3,9})[ \t]{0,9}([\w+#.-]{0,20})[^`\n]{0,200}$", re.MULTILINE)


def find_program(response: str, languages: Sequence[Language], *, fenced: bool = True) -> tuple[Language, str] | None:
    """Language and text of the program, or None."""
    text = after_thinking(response[-MAX_CHARS:])
    found = _fenced(text, languages) if fenced else (languages[0], text)
    return found if found and found[1].strip() and len(found[1]) <= MAX_PROGRAM_CHARS else None


def _fenced(text: str, languages: Sequence[Language]) -> tuple[Language, str] | None:
    by_tag: dict[str, Language] = {tag: language for language in languages for tag in LANGUAGES[language].tags}
    tagged = untagged = None
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            block, tag = text[opened.end() + 1 : fence.start()], opened[2].lower()
            if tag in by_tag:
                tagged = by_tag[tag], block
            elif not tag:
                untagged = languages[0], block
            opened = None
    return None if opened else tagged or untagged
