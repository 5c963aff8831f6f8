"""Chat templates that a configuration names: a format of `text.chat_format`, or a file with a Jinja template."""

from pathlib import Path

from tinyoai.text import chat_format

KNOWN = ("auto", *chat_format.NAMES)
MAX_BYTES = 256 << 10


class BadTemplateFile(Exception):
    """The name means neither; the message is one sentence for the user."""


def is_file(template: str) -> bool:
    """Whether this is a file's path and not a format's name."""
    return template not in KNOWN


def read(template: str, folder: str = "") -> str:
    """The source of a template file, whose path begins at `folder`. Blocks. Raises BadTemplateFile."""
    path = Path(folder, template)
    try:
        if not path.exists():
            raise BadTemplateFile(f"{template!r} is not one of {', '.join(KNOWN)}, and there is no such file")
        if not path.is_file():
            raise BadTemplateFile(f"the chat template {template!r} is not a file")
        with path.open("rb") as file:
            source = file.read(MAX_BYTES + 1)
        if len(source) > MAX_BYTES:
            raise BadTemplateFile(f"the chat template {template!r} has more than {MAX_BYTES} bytes")
        if not source.strip():
            raise BadTemplateFile(f"the chat template {template!r} is empty")
        return source.decode()
    except UnicodeDecodeError:
        raise BadTemplateFile(f"the chat template {template!r} is not UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadTemplateFile(f"cannot read the chat template {template!r}: {reason}") from None
