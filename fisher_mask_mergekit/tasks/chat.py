"""Chats: what of them the model reads and what it is to answer, as the checkpoint's template writes it."""

from collections.abc import Sequence
from typing import Any

from fisher_mask_mergekit.errors import CheckpointError, DataError, first_line
from fisher_mask_mergekit.settings import FisherSettings


def as_messages(value: Any, column: str, settings: FisherSettings) -> tuple[dict[str, Any], ...]:
    """A chat up to its last answer.

    Raises:
        DataError: If it is not a list of messages with role and content, or nothing in it is an answer.
    """
    if not isinstance(value, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
    ):
        raise DataError(
            f"'{settings.data}': column '{column}' must hold chats, lists of {{role, content}}, got {value!r:.80}"
            + ("; it is their text: parse it (json.loads)" if isinstance(value, str) else "")
        )
    # A table has every key in every row.
    chat = [{key: entry for key, entry in message.items() if entry is not None} for message in value]
    last = max((place for place, message in enumerate(chat) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise DataError(
            f"'{settings.data}': a chat in column '{column}' has no answer of the assistant's to anything: {value!r:.80}"
        )
    return tuple(chat[: last + 1])


def split_chat(chat: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[str, str]:
    """A chat as text: all before the last answer, with what opens the answer; and the answer with its end.

    Raises:
        CheckpointError: If the checkpoint has no chat template, or one that writes what is before the
            answer otherwise when the answer follows.
        DataError: If the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise CheckpointError(
            "the checkpoint's tokenizer has no chat template, so it does not say how it reads messages; "
            "measure on a column of text, or on prompt and completion"
        )
    try:
        before = tokenizer.apply_chat_template(list(chat[:-1]), add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(list(chat), tokenize=False)
    except Exception as error:  # Templates are programs: what they raise is jinja's or theirs.
        raise DataError(
            f"the checkpoint's chat template refuses a chat: {first_line(error)}: {chat!r:.80}"
        ) from error
    if not whole.startswith(before):
        raise CheckpointError(
            "the checkpoint's chat template writes a chat with its answer otherwise than it asks for the answer, so "
            "it does not say where the answer begins; measure on prompt and completion"
        )
    return before, whole[len(before) :]
