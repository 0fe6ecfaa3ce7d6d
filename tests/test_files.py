"""Files are held against their sizes and checksums."""

import json

import pytest

from cap_llm.runtime.files import digests, verify


@pytest.fixture
def written(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "inner" / "b.bin").write_bytes(b"")
    return tmp_path, json.loads(json.dumps(digests(tmp_path, ["a.bin", "inner/b.bin"])))


def test_files_are_as_they_were_written(written):
    folder, recorded = written
    assert recorded["a.bin"]["size"] == 2**20 and recorded["inner/b.bin"]["size"] == 0
    assert verify(folder, recorded) is None
    assert verify(folder, {}) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "one bit": (lambda folder: flip(folder / "a.bin"), "a.bin"),
    "truncated": (lambda folder: (folder / "a.bin").write_bytes(b"ab"), "a.bin has 2 bytes"),
    "grown": (lambda folder: (folder / "inner" / "b.bin").write_bytes(b"c"), "inner/b.bin"),
    "gone": (lambda folder: (folder / "a.bin").unlink(), "a.bin"),
    "a folder": (lambda f: (f / "a.bin").unlink() or (f / "a.bin").mkdir(), "a.bin"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_the_file_named(written, name):
    folder, recorded = written
    damage, said = DAMAGE[name]
    damage(folder)
    assert verify(folder, recorded).startswith(said)
