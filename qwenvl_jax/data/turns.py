"""Chat rows by their turns: which pictures they hold, and how many turns fit a length."""

import dataclasses
from collections.abc import Mapping, Sequence

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record, Source, check_record
from qwenvl_jax.prompt.chat import (
    DEFAULT_SYSTEM,
    ChatError,
    messages_from_conversations,
    render_example,
)
from qwenvl_jax.prompt.tokenizer import Tokenizer, cut_images
from qwenvl_jax.prompt.vocabulary import TokenizerError


def picture_paths(conversations: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns what stands inside the `<img>` tags of the turns that are learnt, exactly as typed.

    Raises: ChatError for turns of another form; TokenizerError where an `<img>` is not closed.
    """
    _, *messages = messages_from_conversations(conversations)
    return [path for message in messages for path in cut_images(str(message.content))[1::2]]


def fit_turns(record: Record, tokenizer: Tokenizer, length: int) -> Record:
    """Returns a chat row whose sample has at most `length` ids, its last turns dropped for that.

    A turn is what the user says with the answer to it, and its pictures go with it, so neither an
    answer nor a picture is ever cut. A row that fits, and a row of another task, comes back as it
    is.

    Raises: DataError where not even the first turn fits, or the row is not a dialogue.
    Differs: the released preprocessing cuts the ids at `length`, in a picture's slots too.
    """
    if record.task != "chat":
        return record
    check_record(record)
    conversations = record.fields["conversations"]
    try:
        messages = messages_from_conversations(
            conversations, record.fields.get("system", DEFAULT_SYSTEM)
        )
        rows = [render_example(tokenizer, [message]) for message in messages]
    except (ChatError, TokenizerError) as error:
        raise DataError(f"row {record.key}: {error}") from error
    sizes = [len(row.ids) for row in rows]
    if sum(sizes) <= length:
        return record
    total, kept = 0, 0
    for i, (message, size) in enumerate(zip(messages, sizes, strict=True)):
        total += size
        if total > length:
            break
        is_last_answer = i + 1 == len(messages) or messages[i + 1].role == "user"
        if message.role == "assistant" and is_last_answer:
            kept = i
    if kept == 0:
        raise DataError(
            f"row {record.key} is too long: got {sum(sizes)} ids, and its first question and "
            f"answer alone do not fit into {length}; raise the length, or shorten or drop the row"
        )
    num_images = sum(len(row.images) for row in rows[: kept + 1])
    dropped_first = len(conversations) - (len(messages) - 1)  # an answer before any question
    fields = {**record.fields, "conversations": conversations[: dropped_first + kept]}
    return record._replace(fields=fields, images=record.images[:num_images])


@dataclasses.dataclass(frozen=True)
class CutTurns:
    """The rows of a source, whose dialogues lose the last turns that a length has no room for."""

    source: Source
    tokenizer: Tokenizer
    length: int

    @property
    def fingerprint(self) -> str:
        slots = self.tokenizer.slots
        return f"{self.source.fingerprint} turns cut to {self.length} with {slots} slots a picture"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """Raises: as the source does, and DataError for a row whose first turn does not fit."""
        return fit_turns(self.source[index], self.tokenizer, self.length)
