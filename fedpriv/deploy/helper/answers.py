"""Helper's side of the messages in `fedpriv.deploy.helper.messages`."""

import logging
from pathlib import Path

from flwr.app import Context, Message

from fedpriv.deploy.helper.folder import load_helper
from fedpriv.deploy.helper.messages import HELPER_HOME, Question, helper_content, question_of
from fedpriv.errors import UserError
from fedpriv.flower.messages import refusal_record
from fedpriv.flower.refusals import Refusal
from fedpriv.secure import Query

__all__ = ["answer_query"]

_log = logging.getLogger("flwr")


def answer_query(message: Message, context: Context) -> Message:
    """Return a helper's answer to a question; a refusal is an answer, too. A node without a helper's folder refuses.

    A helper has no data of clients: the full line of its refusals may leave.
    """
    try:
        home = context.node_config.get(HELPER_HOME)
        if not home:
            raise UserError(
                "node", "a helper of secure aggregation", "a node without a helper's folder", "Ask a helper"
            )
        return Message(helper_content(*_answered(message, Path(str(home)))), reply_to=message)
    except UserError as error:
        _log.warning("refused: %s", error)
        return Message(refusal_record("policy", str(error)), reply_to=message)
    except Exception:
        _log.exception("the question could not be answered")
        return Message(refusal_record("trouble", Refusal.because("trouble", "").public_line), reply_to=message)


def _answered(message: Message, home: Path) -> tuple[Question, bytes]:
    helper, (question, content) = load_helper(home), question_of(message.content)
    if question == "sum":
        return question, helper.answer(Query.from_bytes(content)).to_bytes()
    run = _run_of(content)
    if question == "key":
        return question, helper.key(run).to_bytes()
    helper.erase(run)
    return question, b""


def _run_of(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError("run", "a name in UTF-8", repr(content[:20]), "Use the same version everywhere") from None
