"""`cache` and `cache clear`: what is on disk, by model."""

import json
from array import array
from pathlib import Path

import pytest

from tests.cli.commands import Place, refused
from tinyoai.host import cache_files
from tinyoai.host.cache_files import FileHeader, Folder


@pytest.fixture
def folder(place: Place) -> Folder:
    """The folder with two conversations of one model and one of another."""
    made = Folder(place.home / cache_files.FOLDER, 1 << 30)
    made.prepare()
    for model, n in (("a", 70), ("a", 80), ("b b", 90)):
        header = FileHeader(key="0" * 64, model=model, scope="", n_tokens=n)
        path = made.new_name(header.key)
        assert cache_files.write(path, header, array("i", range(n)), bytes(1000), 1.7e9, lambda: True)
    return made


def test_what_is_kept_is_shown_by_model(place: Place, folder: Folder) -> None:
    done = place.run("cache")
    assert done.returncode == 0, done
    rows = [line.split("  ") for line in done.stdout.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0] == ["model", "conversations", "tokens", "size", "last use"]
    by_model = {row[0]: row[1:3] for row in cells if row}
    assert by_model["a"] == ["2", "150"]
    assert by_model["b b"] == ["1", "90"]
    assert by_model["total"][0] == "3"
    found = json.loads(place.run("cache", "--json").stdout)
    assert {row["model"]: row["tokens"] for row in found["models"]} == {"a": 150, "b b": 90}
    assert found["size"] == sum(file.size for file in folder.files())
    assert found["limit"] == 2 << 30
    assert json.loads(place.run("cache", "--json", TINYOAI_CACHE_DISK="1M").stdout)["limit"] == 1 << 20


def test_an_empty_cache_is_no_error(place: Place) -> None:
    assert "total" in place.run("cache").stdout
    assert place.run("cache", "clear").stdout == "deleted 0 conversations, 0.0 MB\n"
    assert not (place.home / cache_files.FOLDER).exists()


def test_a_model_s_or_all_conversations_are_deleted(place: Place, folder: Folder) -> None:
    assert place.run("cache", "clear", "b b").stdout.startswith("deleted 1 conversation, ")
    assert "there are some of a" in refused(place.run("cache", "clear", "c"), 1)
    damaged = folder.files()[0].path
    damaged.write_bytes(b"x")
    assert "unreadable" in place.run("cache").stdout
    assert place.run("cache", "clear").stdout.startswith("deleted 2 conversations")
    assert folder.files() == []


def test_links_are_neither_followed_nor_deleted(place: Place, folder: Folder, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.write_bytes(b"x")
    link = folder.new_name("0" * 64)
    link.symlink_to(target)
    place.run("cache", "clear")
    assert target.exists()
    assert link.is_symlink()


def test_wrong_usage_is_one_sentence(place: Place) -> None:
    refused(place.run("cache", "--jsn"), 2)
    refused(place.run("cache", "clear", "a", "b"), 2)
    assert "tinyoai cache clear m" in place.run("cache", "--help").stdout
