"""Messages between the server of a deployment and a helper: the server asks, the helper answers.

| question | content | answer |
|---|---|---|
| `key` | name of the run | `HelperKey` |
| `sum` | `Query` | `Answer` |
| `end` | name of the run | nothing; the helper has erased its key for the run |

All contents are bytes in one record, and a refusal is one line, as from a client.
"""

from typing import Literal

from flwr.app import ConfigRecord, RecordDict

from fedpriv.errors import UserError

__all__ = ["ACTION", "HELPER_HOME", "Question", "content_of", "helper_content", "question_of"]

ACTION = "secure"
"""Action of the messages, whose type is `query.secure`."""

HELPER_HOME = "fedpriv-helper-home"
"""Key of a node's configuration for the folder of a helper."""

Question = Literal["key", "sum", "end"]

_QUESTIONS: dict[str, Question] = {"key": "key", "sum": "sum", "end": "end"}
_RECORD, _ASKED, _CONTENT = "fedpriv-helper", "asked", "content"


def helper_content(question: Question, content: bytes) -> RecordDict:
    """Return the content of a question or of its answer."""
    return RecordDict({_RECORD: ConfigRecord({_ASKED: question, _CONTENT: content})})


def question_of(message: RecordDict) -> tuple[Question, bytes]:
    """Return the question, and its content, of a message or an answer.

    Raises:
        UserError: If there is none.
    """
    record = message.config_records.get(_RECORD)
    asked, content = (None, None) if record is None else (record.get(_ASKED), record.get(_CONTENT))
    question = _QUESTIONS.get(asked) if isinstance(asked, str) else None
    if question is None or not isinstance(content, bytes):
        got = f"records {sorted(message)} with the action {asked!r}"
        raise UserError("message", "a question to a helper", got, "Use the same version everywhere")
    return question, content


def content_of(message: RecordDict, question: Question) -> bytes:
    """Return the content of the answer to a question.

    Raises:
        UserError: If it is the answer to another one.
    """
    answered, content = question_of(message)
    if answered != question:
        raise UserError("answer of a helper", f"the answer to {question!r}", repr(answered), "Ask it again")
    return content
