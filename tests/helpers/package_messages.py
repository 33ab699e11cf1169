"""Every message that the package can raise, warn of or answer with, read from its source."""

from __future__ import annotations

import ast
from typing import NamedTuple

from paths import PACKAGE

#: Functions that make a message for someone else to raise, and tables of messages.
MAKERS = {
    "cut",
    "cut_loss",
    "no_derivative",
    "not_twice",
    "not_finite",
    "rejected",
    "not_once",
    "_no_split",
    "_no_option",
    "_no_step",
}
TABLES = {"_FOREIGN"}
#: Raised for the package's own use, and answered before a user could see them.
INTERNAL = {"StopIteration", "Usage"}


class Message(NamedTuple):
    """The fixed pieces of a message, and where it stands."""

    where: str
    pieces: tuple[str, ...]


def pieces_of(node: ast.AST) -> list[str]:
    """The literal text in an expression, piece by piece; what is filled in parts them."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [text for value in node.values for text in pieces_of(value)]
    if isinstance(node, ast.FormattedValue):
        return []
    if isinstance(node, ast.BinOp):
        return pieces_of(node.left) + pieces_of(node.right)
    if isinstance(node, ast.IfExp):
        return pieces_of(node.body) + pieces_of(node.orelse)
    return []


def _texts(tree: ast.Module) -> list[tuple[int, ast.AST]]:
    found: list[tuple[int, ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if ast.unparse(node.exc.func) not in INTERNAL:
                found += [(node.lineno, argument) for argument in node.exc.args[:1]]
        elif isinstance(node, ast.keyword) and node.arg == "reason":
            found.append((node.value.lineno, node.value))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if isinstance(node.value, ast.Dict) and name in TABLES:
                found += [(value.lineno, value) for value in node.value.values]
            elif name in ("message", "reason") or (name.isupper() and not name.startswith("__")):
                found.append((node.lineno, node.value))
        elif isinstance(node, ast.FunctionDef) and node.name in MAKERS:
            for inner in ast.walk(node):
                cause = isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == "cause"
                if (cause or isinstance(inner, ast.Return)) and inner.value is not None:
                    found.append((inner.lineno, inner.value))
    return found


def messages() -> list[Message]:
    """All of them, in the order of the files."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__main__.py":  # its errors are about the command line itself
            continue
        where = path.relative_to(PACKAGE)
        for line, node in _texts(ast.parse(path.read_text(encoding="utf-8"))):
            pieces = tuple(" ".join(piece.split()) for piece in pieces_of(node))
            if len(" ".join(pieces).split()) >= 4:
                found.append(Message(f"{where}:{line}", pieces))
    return found
