"""Texts from result files made harmless for the place they go to. Anyone can write a result file."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from html import escape
from pathlib import Path
from typing import Any

# What ends a line in LaTeX or Markdown, drives a terminal, or turns the direction of the text around it.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINERS = {"\u200c", "\u200d"}  # parts of emoji and of words in several scripts
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "±": r"\ensuremath{\pm}",
    "−": r"\ensuremath{-}",
    "×": r"\ensuremath{\times}",
    "↑": r"\ensuremath{\uparrow}",
    "↓": r"\ensuremath{\downarrow}",
    "†": r"\textsuperscript{\textdagger}",
    "Λ": r"\ensuremath{\Lambda}",
    "…": r"\ldots{}",
    **{character: "\\" + character for character in "#$%&_{}"},
}


def read_json(text: str) -> Any:
    """Parse JSON; halves of surrogate pairs, which no encoding can write again, become question marks."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"))
    return value


def file_name(file: Path) -> str:
    """Return a path as text; bytes that are not UTF-8 become question marks."""
    return os.fsencode(file).decode("utf-8", errors="replace")


def plain(text: str) -> str:
    """Return `text` on one line, without control, formatting or unassigned characters: safe for a terminal."""
    text = re.sub(r"\s+", " ", text)
    return "".join(c for c in text if c in _JOINERS or unicodedata.category(c) not in _UNSEEN).strip()


def shorten(text: str, longest: int = 60) -> str:
    """Return `text`, with its middle left out if it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def latex(text: str) -> str:
    """Escape `text` for a LaTeX table, and shorten it; letters that plain pdflatex lacks become their code points."""
    written = "".join(_latex_character(character) for character in shorten(plain(text)))
    return written.replace("--", "-{}-").replace("--", "-{}-")  # two hyphens would be set as a dash


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii() or (character.isalpha() and character <= "\u00ff"):
        return character
    return f"[U+{ord(character):04X}]"


def markdown(text: str) -> str:
    """Escape `text` for a cell of a Markdown table; an underscore inside a word needs no escape."""
    text = re.sub(r"([\\`*\[\]|!#~$])", r"\\\1", plain(text))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def spreadsheet(text: str) -> str:
    """Escape `text` for a CSV cell, so that no spreadsheet takes it for a formula (OWASP, "CSV Injection")."""
    text = plain(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def html(text: str) -> str:
    """Escape `text` for HTML that is not written by a template (templates escape by themselves)."""
    return escape(plain(text), quote=True)
