"""What the exported cells of a notebook define, read from their source: names, signatures, docments.

Nothing is imported, so that a notebook whose module is not exported yet, or does not import here, has its page all the
same. A docment is the comment on the line of a parameter, or the comment lines above it, as fastcore reads them.
"""
from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Parameter:
    "One parameter or field"
    name: str                     # with its stars
    annotation: str = ""          # as written
    default: str | None = None    # as written
    text: str = ""                # its docment
    named: bool = False           # a field that is given by name only


@dataclass(frozen=True)
class Entry:
    "One name of the API"
    name: str                              # in its module: `Report.save`
    kind: str                              # function, class, method, property, data
    module: str = ""                       # longlens.report
    doc: str = ""                          # docstring
    parameters: tuple[Parameter, ...] = ()
    marks: tuple[str, ...] = ()            # "*" and "/" stand before the parameter of that number
    returns: str = ""                      # annotation
    returned: str = ""                     # docment of what is returned
    bases: tuple[str, ...] = ()            # of a class
    decorators: tuple[str, ...] = ()
    init: bool = False                     # does a class have an `__init__` of its own?
    members: tuple[Entry, ...] = field(default=())

    @property
    def fields(self) -> bool:
        "Do its parameters come from fields, to which a subclass adds its own?"
        made = {"dataclass", "dataclasses.dataclass"} & {*self.decorators}
        return self.kind == "class" and bool(made) and not self.init

    @property
    def public(self) -> bool: return not any(part.startswith("_") and part != "__call__" for part in self.name.split("."))

    @property
    def signature(self) -> str:
        "As it would be written in Python, without `self`"
        if self.kind in ("property", "data"): return ""
        parts = [one.name + (f": {one.annotation}" if one.annotation else "")
                 + ("" if one.default is None else f" = {one.default}" if one.annotation else f"={one.default}") for one in self.parameters]
        for number, mark in sorted(((int(m[1:]), m[0]) for m in self.marks), reverse=True): parts.insert(number, mark)
        arrow = f" -> {self.returns}" if self.returns and self.kind != "class" else ""
        return f"({', '.join(parts)}){arrow}"


def comments(source: str) -> dict[int, str]:
    "The comments of a cell, by line"
    found = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT: found[token.start[0]] = token.string.lstrip("#").strip()
    except (tokenize.TokenError, IndentationError): pass
    return found


def docment(line: int, comment_at: dict[int, str], taken: set[int]) -> str:
    "The comment on a line, or the comments right above it"
    if line in comment_at: return comment_at[line]
    above: list[str] = []
    while (line := line - 1) in comment_at and line not in taken: above.insert(0, comment_at[line])
    return " ".join(above)


def _default(node: ast.expr | None) -> str | None:
    if node is None: return None
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("field", "dataclasses.field"):
        given = {k.arg: k.value for k in node.keywords}
        return _default(given["default"]) if "default" in given else "..." if "default_factory" in given else None
    return ast.unparse(node)


def _parameters(node: Function, comment_at: dict[int, str], drop_first: bool) -> tuple[tuple[Parameter, ...], tuple[str, ...], str]:
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + [*args.defaults]
    rows = [(arg, "", default) for arg, default in zip(plain, defaults, strict=True)][int(drop_first):]
    marks = [f"/{len(args.posonlyargs) - drop_first}"] if args.posonlyargs else []
    if args.vararg: rows.append((args.vararg, "*", None))
    elif args.kwonlyargs: marks.append(f"*{len(rows)}")
    rows += [(arg, "", default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg: rows.append((args.kwarg, "**", None))
    owner = {arg.lineno: arg.arg for arg, _, _ in rows} | ({node.returns.lineno: "return"} if node.returns else {})
    text_of = lambda arg: docment(arg.lineno, comment_at, {*owner}) if owner[arg.lineno] == arg.arg else ""
    found = tuple(Parameter(stars + arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", _default(default), text_of(arg))
                  for arg, stars, default in rows)
    returned = comment_at.get(node.returns.lineno, "") if node.returns and node.body[0].lineno > node.returns.lineno else ""
    return found, tuple(marks), returned


def _doc(node: Function | ast.ClassDef) -> str: return ast.get_docstring(node) or ""


def _function(node: Function, comment_at: dict[int, str], owner: str = "") -> Entry:
    decorators = tuple(ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list)
    kind = "function" if not owner else "property" if {"property", "cached_property", "patch_property"} & {*decorators} else "method"
    static = "staticmethod" in decorators
    found, marks, returned = _parameters(node, comment_at, bool(owner) and not static)
    return Entry(f"{owner}.{node.name}" if owner else node.name, kind, doc=_doc(node), parameters=found, marks=marks,
                 returns=ast.unparse(node.returns) if node.returns else "", returned=returned, decorators=decorators)


def ordered(fields: Iterable[Parameter]) -> tuple[tuple[Parameter, ...], tuple[str, ...]]:
    "Fields as the constructor takes them, and the marks between them"
    found = sorted(fields, key=lambda one: one.named)
    first = next((number for number, one in enumerate(found) if one.named), None)
    return tuple(found), () if first is None else (f"*{first}",)


def _fields(node: ast.ClassDef, comment_at: dict[int, str]) -> Iterator[Parameter]:
    own = {one.target.id: one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}
    lines = {one.lineno for one in own.values()}
    for name, one in own.items():
        annotation, value = ast.unparse(one.annotation), ast.unparse(one.value) if one.value else ""
        if name.startswith("_") or "ClassVar" in annotation or "init=False" in value: continue
        yield Parameter(name, annotation, _default(one.value), docment(one.lineno, comment_at, lines), "kw_only=True" in value)


def _class(node: ast.ClassDef, comment_at: dict[int, str]) -> Entry:
    inside = [_function(one, comment_at, node.name) for one in node.body if isinstance(one, Function)]
    init = next((one for one in inside if one.name.endswith(".__init__")), None)
    bases, written = tuple(map(ast.unparse, node.bases)), [*map(ast.unparse, node.decorator_list)]
    decorators = tuple(mark.split("(")[0] for mark in written)
    has_fields = {"dataclass", "dataclasses.dataclass"} & {*decorators} or {"NamedTuple", "TypedDict"} & {*bases}
    named = any("kw_only=True" in mark for mark in written)
    fields = [replace(one, named=named or one.named) for one in _fields(node, comment_at)] if has_fields else []
    parameters, marks = (init.parameters, init.marks) if init else ordered(fields)
    return Entry(node.name, "class", doc=_doc(node), parameters=parameters, marks=marks, bases=bases, decorators=decorators,
                 init=init is not None, members=tuple(one for one in inside if one.public))


def _patched(node: Function) -> str:
    "The class that `@patch` gives a function to"
    if not any(ast.unparse(d).split("(")[0] == "patch" for d in node.decorator_list) or not node.args.args: return ""
    given = node.args.args[0].annotation
    return ast.unparse(given).split("|")[0].strip(" '\"") if given else ""


def _constant(node: ast.stmt, comment_at: dict[int, str]) -> Iterator[Entry]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        if isinstance(target, ast.Name) and target.id.isupper():
            yield Entry(target.id, "data", doc=comment_at.get(node.lineno, ""),
                        returns=ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else "")


def _placed(one: Entry, module: str) -> Entry:
    return replace(one, module=module, members=tuple(_placed(m, module) for m in one.members))


def entries(
    source: str,        # of an exported cell
    module: str = "",   # that it is exported to
    private: bool = False,    # names with an underscore too
) -> list[Entry]:
    "The names that a cell defines, in order"
    try: tree = ast.parse(source)
    except SyntaxError: return []
    comment_at, found = comments(source), []
    for node in tree.body:
        if isinstance(node, Function): found.append(_function(node, comment_at, _patched(node)))
        elif isinstance(node, ast.ClassDef): found.append(_class(node, comment_at))
        else: found += _constant(node, comment_at)
    return [_placed(one, module) for one in found if one.public or private]
