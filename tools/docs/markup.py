"""Text as MyST markdown: escaped where it is not markdown, with links where it names something of the package"""
from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import replace

from book import Index
from entries import Entry, Parameter

FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1`*~*[ \t]*$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6}[ \t].*$", re.MULTILINE)
SPAN = re.compile(r"(?<![`\[])`([^`\n]+)`(?![`\]])")
CODE_OR_MATH = re.compile(r"(?<!`)`[^`\n]+`(?!`)")
LINK = re.compile(r"(\]\(|(?:src|href)=\")(?![a-z]+:|#|/)([^)\"\s]+)")
CALLED = re.compile(r"(?:ll\.|longlens\.)?([A-Za-z_]\w*(?:\.[a-z]\w*)?)(\(.*\))?")


def outside(pattern: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    "The text, changed where the pattern does not match"
    out, at = [], 0
    for match in pattern.finditer(text):
        out += [change(text[at:match.start()]), match[0]]
        at = match.end()
    return "".join([*out, change(text[at:])])


def escaped(text: str) -> str:
    "A docstring or docment: backticks mean code, nothing else means anything"
    plain = lambda part: re.sub(r"([\\*_\[\]<>$#{}|^~])", r"\\\1", part)
    return outside(CODE_OR_MATH, text, plain)


def telling(name: str, calls: str | None, index: Index, module: str) -> bool:
    "Is a word in backticks meant as a name of the package, and not as a column, a word, or an argument?"
    known = index.find(name.partition(".")[0], module)
    if not known or not index.target(name, module): return False
    if calls or name.lower() != name or name in index.public: return True
    return (known[0].module == f"longlens.{module}" or "_" in name) and name not in index.arguments.get(module, set())


def linked(text: str, index: Index, module: str = "") -> str:
    "Names in backticks lead to their entries, outside of code blocks, headings and links"
    def link(match: re.Match[str]) -> str:
        if match[1] in index.modules and match[1] != f"longlens.{module}": return f"[{match[0]}](/{index.modules[match[1]]}.md)"
        called = CALLED.fullmatch(match[1])
        if not called or not telling(called[1], called[2], index, module): return match[0]
        return f"{{py:obj}}`{match[1].replace('<', chr(92) + '<')} <{index.target(called[1], module)}>`"
    return outside(FENCE, text, lambda part: outside(HEADING, part, lambda p: SPAN.sub(link, p)))


def moved(text: str, folder: str, place: Callable[[str], str]) -> str:
    "Relative links, from a folder of the repository, as `place` says where their targets are on the site"
    def move(link: re.Match[str]) -> str:
        target, mark, anchor = link[2].partition("#")
        return f"{link[1]}{place(posixpath.normpath(posixpath.join(folder, target)))}{mark}{anchor}"
    return outside(FENCE, text, lambda part: outside(CODE_OR_MATH, part, lambda p: LINK.sub(move, p)))


def demoted(text: str, by: int) -> str:
    "The text with its headings so many levels lower"
    return outside(FENCE, text, lambda part: re.sub(r"^(#{1,5})(?=[ \t])", "#" * by + r"\1", part, flags=re.MULTILINE)) if by else text


def raw(html: str) -> str:
    "HTML as it is"
    return block("raw", "html", html)


def block(name: str, argument: str, body: str, language: bool = False) -> str:
    "A directive, or a code block, whose fence is longer than any in it"
    longest = max((len(m) for m in re.findall(r"`{3,}", body)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{name if language else '{' + name + '}'}{' ' + argument if argument else ''}\n{body}\n{fence}"


def _field(one: Parameter, index: Index, module: str) -> str:
    name = one.name.replace("*", r"\*")
    return f":param {name}: {linked(escaped(one.text), index, module)}" if one.text else ""


def described(entry: Entry, index: Index, name: str = "", options: str = "", note: str = "", later: bool = True) -> str:
    "An entry of the reference, with its members; also with those that later cells add, if `later`"
    module, own = entry.module.removeprefix("longlens."), entry.members
    entry = index.whole(entry)
    if not later: entry = replace(entry, members=own)
    said = lambda text: linked(escaped(text), index, module)
    with_it = " A context manager: `with` it; what it does is undone when the block ends." * ("contextmanager" in entry.decorators)
    parts = [said(entry.doc + "." * bool(with_it) + with_it)] if entry.doc else []
    if entry.bases: parts.append(f"Bases: {', '.join(said(f'`{b}`') for b in entry.bases)}")
    fields = [f for f in (_field(p, index, module) for p in entry.parameters) if f]
    if entry.returned: fields.append(f":returns: {said(entry.returned)}")
    if fields: parts.append("\n".join(fields))
    if note: parts.append(f"{{.where}}\n{note}")
    parts += [described(m, index, m.name.partition(".")[2], options + ":no-contents-entry:\n") for m in entry.members]
    marks = {"staticmethod": ":staticmethod:\n", "classmethod": ":classmethod:\n"}
    extra = "".join(marks.get(d, "") for d in entry.decorators) if entry.kind == "method" else ""
    kind = ":type: " + entry.returns + "\n" if entry.kind in ("property", "data") and entry.returns else ""
    body = f"{options}{extra}{kind}\n" + "\n\n".join(parts)
    return block(f"py:{entry.kind}", (name or entry.name) + entry.signature, body)
