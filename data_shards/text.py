"""Text on pictures, in a font that has its characters.

Pillow's own font knows little more than Latin letters. For others a font of the system is taken, which fontconfig
knows; letters that no font has are written as Python escapes them, e.g. ``\\u732b``, never as empty boxes.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont

MAX_LETTERS = 80
"""Longer texts are cut: an untrusted class name may be of any length."""
_USUAL_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "unifont.otf")
"""Tried where fontconfig is not installed; Pillow looks for them in the system's folders."""
_JOINERS = "\u200c\u200d"
"""Without a glyph of their own: they change how their neighbours are drawn."""
_NO_LETTER = "\U0010fffe"
"""Whatever a font draws for it, it draws for every letter that it lacks."""
_FONTCONFIG_S = 5.0


@functools.lru_cache(maxsize=4096)
def written(text: str, size: int) -> tuple[Font, str]:
    """Return the font that has most of the letters of a text, and the text as it can be drawn in it: one line, without
    control characters, letters that are missing escaped.

    Args:
        size: of the font in pixels.
    """
    line = " ".join(text.split()) if len(text) <= MAX_LETTERS else " ".join(text[: MAX_LETTERS - 1].split()) + "…"
    letters = frozenset(letter for letter in line if letter.isprintable() and letter != " ")
    best = ImageFont.load_default(size)
    assert isinstance(best, Font)  # Pillow has FreeType
    missing = _missing(best, letters)
    if missing:
        for font in _others(letters, size):
            found = _missing(font, letters)
            if len(found) < len(missing):
                best, missing = font, found
            if not missing:
                break
    return best, "".join(letter if _drawable(letter, missing) else _escaped(letter) for letter in line)


def _drawable(letter: str, missing: frozenset[str]) -> bool:
    return letter in _JOINERS or (letter.isprintable() and letter not in missing)


def _escaped(letter: str) -> str:
    return "..." if letter == "…" else letter.encode("unicode_escape").decode("ascii")


def _others(letters: frozenset[str], size: int) -> Iterator[Font]:
    """Yield fonts of the system that may have the characters, the likeliest first."""
    for name, index in (*_known_to_fontconfig(letters), *((name, 0) for name in _USUAL_FONTS)):
        try:
            yield ImageFont.truetype(name, size, index)
        except OSError:  # it is not there, or has no letters of this size, as coloured emojis
            continue


def _known_to_fontconfig(letters: frozenset[str]) -> list[tuple[str, int]]:
    charset = " ".join(f"{ord(letter):x}" for letter in sorted(letters))
    command = ["fc-match", "--format", "%{file}\t%{index}", f"sans:charset={charset}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FONTCONFIG_S, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    name, _, index = done.stdout.partition("\t")
    return [(name, int(index) & 0xFFFF)] if Path(name).is_file() and index.isdecimal() else []


def _missing(font: Font, letters: frozenset[str]) -> frozenset[str]:
    try:
        # Letter by letter: shaping would put a circle under a lone vowel sign, whether or not the font has that.
        plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
        none = _drawn(plain, _NO_LETTER)
        return frozenset(letter for letter in letters if _drawn(plain, letter) == none)
    except (OSError, ValueError):
        return letters


def _drawn(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
