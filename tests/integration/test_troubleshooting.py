"""docs/troubleshooting.md has every message of the package, by words that no other message has."""

import pytest
from package_messages import messages
from paths import ROOT

from torch_hf.diagnostics import ADVICE

PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = messages()


def plain(text):
    """Without what Markdown adds, and without the ends of sentences."""
    return " ".join(text.replace("`", "").replace("|", " ").split())


def windows(message, length=4):
    """Runs of words in one piece of a message; the whole of what is shorter."""
    for piece in message.pieces:
        words = plain(piece).strip(" .:;,(").split()
        for i in range(max(1, len(words) - length + 1)):
            yield " ".join(words[i : i + length])


PAGE_TEXT = plain(PAGE.read_text(encoding="utf-8"))
OTHERS = {m: "\n".join(plain(" ".join(o.pieces)) for o in MESSAGES if o != m) for m in MESSAGES}


def test_the_messages_are_found():
    assert len(MESSAGES) > 120
    text = " ".join(" ".join(m.pieces) for m in MESSAGES)
    for known in ("needs a closure that computes", "GradScaler", "not deterministic", "one device"):
        assert known in text


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.where)
def test_a_message_is_on_the_page(message):
    said = list(windows(message))
    own = [w for w in said if w not in OTHERS[message]] or said
    assert any(w in PAGE_TEXT for w in own), (
        f"{message.where}: {' … '.join(message.pieces)!r} is not in docs/troubleshooting.md. Add "
        "its first words, why it is said, and what to type."
    )


@pytest.mark.parametrize(("operation", "instead"), ADVICE.items())
def test_an_operation_is_in_the_table(operation, instead):
    assert operation in PAGE_TEXT
    assert plain(instead) in PAGE_TEXT
