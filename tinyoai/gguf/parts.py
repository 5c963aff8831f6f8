"""A model in several files: `NAME-00001-of-00003.gguf` and so on, as splitting tools write them.

The first file has the metadata; each has a part of the tensors.
"""

import re
from pathlib import Path

from tinyoai.gguf import reader
from tinyoai.gguf.header import BadModelFile, Header

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_MAX_PARTS = 1000


def stem(path: Path) -> str:
    """The file's name without its suffix, and without the number of a part."""
    found = _NAME.fullmatch(path.name)
    return found["stem"] if found else path.stem


def part_paths(path: Path) -> list[Path]:
    """The paths of all files of a model by the name of one of them, the first file first. They need not exist."""
    found = _NAME.fullmatch(path.name)
    count = int(found["count"]) if found else 1
    if not found or not 1 < count <= _MAX_PARTS:
        return [path]
    return [
        path.with_name(f"{found['stem']}-{number:05}-of-{count:05}{found['suffix']}")
        for number in range(1, count + 1)
    ]


def existing_parts(path: Path) -> list[Path]:
    """The paths of all files of a model. Raises BadModelFile that names a missing one, if others are there."""
    paths = part_paths(path)
    missing = [part for part in paths if not part.exists()]
    if missing and len(missing) < len(paths):
        raise BadModelFile(
            f"{missing[0].name} is missing, one of the {len(paths)} files of the model; copy or download it"
        )
    return paths


def read_header(path: Path) -> Header:
    """Reads metadata and tensor table, of a model in several files from all of them.

    Raises OSError, BadModelFile or Unsupported.
    """
    header = reader.read_header(path)
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return header
    paths = existing_parts(path)
    if len(paths) != count:
        raise BadModelFile(
            f"{path} is one of {count} files of a model and was renamed; give the files their names back: "
            f"NAME-00001-of-{count:05}.gguf and so on"
        )
    if path != paths[0]:
        raise BadModelFile(f"{path} is one of {count} files of a model; name the first, {paths[0].name}")
    for number, part in enumerate(paths[1:], 1):
        more = reader.read_header(part)
        if more.metadata.get("split.count") != count or more.metadata.get("split.no") != number:
            raise BadModelFile(
                f"{part} does not belong to the model of {path.name}; copy or download it again"
            )
        double = next((name for name in more.tensors if name in header.tensors), None)
        if double is not None:
            raise BadModelFile(f"{part} has the tensor {double} of another file; copy or download it again")
        header.tensors |= more.tensors
        header.file_size += more.file_size
    total = header.metadata.get("split.tensors.count", len(header.tensors))
    if total != len(header.tensors):
        raise BadModelFile(
            f"{path} and its other files have {len(header.tensors)} of {total} tensors; copy or download them again"
        )
    header.n_files = count
    return header
