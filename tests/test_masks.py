"""Masks on disk: what is written is read again, joined files are as good as one, damage is told."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cap_llm.models.directory import ModelDirectory
from cap_llm.models.mask_file import FILE, MaskFile, join, save_masks
from cap_llm.runtime.errors import UserError
from cap_llm.sparsity.bits import pack, unpack


def random_mask(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5


MASKS = {
    "model.layers.0.q.weight": random_mask(5, 13),
    "model.layers.0.up.weight": random_mask(32, 64, 1),
    "model.layers.1.q.weight": random_mask(1, 1, 2),
    "model.layers.1.up.weight": random_mask(7, 8, 3),
    "model.layers.2.down.weight": random_mask(3, 257, 4),
}


def assert_holds(path, masks: dict[str, torch.Tensor]) -> None:
    file = MaskFile(path)
    assert set(file.columns) == set(masks)
    for name, mask in masks.items():
        assert name in file
        read = file.read(name)
        assert read.dtype == torch.bool and torch.equal(read, mask)
    assert "another.weight" not in file


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_a_packed_mask_unpacks_to_itself(rows, columns, seed):
    mask = random_mask(rows, columns, seed)
    packed = pack(mask)
    assert packed.shape == (rows, -(-columns // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, columns), mask)
    assert packed.tolist() == np.packbits(mask.numpy(), axis=1).tolist()  # the documented format


@pytest.mark.parametrize("value", [True, False])
def test_a_constant_mask_survives(value):
    mask = torch.full((4, 11), value)
    assert torch.equal(unpack(pack(mask), 11), mask)


def test_equal_masks_are_equal_bytes(tmp_path):
    masks = {f"model.layers.{i}.wé.weight": random_mask(3, 5, i) for i in range(30)}
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file in files:
        save_masks(masks, file)
    assert len({file.read_bytes() for file in files}) == 1
    assert_holds(files[0], masks)


def test_a_file_gives_back_its_masks(tmp_path):
    save_masks(MASKS, tmp_path / FILE)
    assert_holds(tmp_path / FILE, MASKS)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / FILE]
    assert not list(tmp_path.glob("*.safetensors"))  # as some loaders look for weights


def test_a_file_takes_one_bit_a_weight(tmp_path):
    save_masks({"w": random_mask(256, 1024)}, tmp_path / FILE)
    assert (tmp_path / FILE).stat().st_size < 256 * 1024 / 8 + 512


def test_the_mask_of_a_transposed_weight_survives(tmp_path):
    mask = random_mask(12, 20).T  # as of GPT-2's Conv1D
    save_masks({"h.0.fc.weight": mask}, tmp_path / FILE)
    assert_holds(tmp_path / FILE, {"h.0.fc.weight": mask})


def parts_of(tmp_path, *groups: dict[str, torch.Tensor]) -> list:
    parts = []
    for i, group in enumerate(groups):
        parts.append(tmp_path / f"part{i}")
        save_masks(group, parts[-1])
    return parts


def by_block() -> list[dict[str, torch.Tensor]]:
    return [{n: m for n, m in MASKS.items() if f"layers.{i}." in n} for i in range(3)]


def test_joined_parts_equal_one_file(tmp_path):
    join(iter(parts_of(tmp_path, *by_block())), tmp_path / FILE)
    assert_holds(tmp_path / FILE, MASKS)
    save_masks(MASKS, tmp_path / "one")
    joined, one = load_file(tmp_path / FILE), load_file(tmp_path / "one")
    assert joined.keys() == one.keys()
    assert all(torch.equal(joined[name], one[name]) for name in one)


def test_one_part_joins_to_itself(tmp_path):
    join(parts_of(tmp_path, MASKS), tmp_path / FILE)
    assert_holds(tmp_path / FILE, MASKS)


def test_joined_files_join_again(tmp_path):
    first, second, third = parts_of(tmp_path, *by_block())
    join([first, second], tmp_path / "both")
    join([tmp_path / "both", third], tmp_path / FILE)
    assert_holds(tmp_path / FILE, MASKS)


def test_no_part_at_all_joins_to_a_readable_file(tmp_path):
    join([], tmp_path / FILE)
    assert_holds(tmp_path / FILE, {})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"\0" * len(data),
        lambda data: b"<html>not found</html>",
    ],
    ids=["empty", "cut in its length", "cut in half", "a byte short", "zeroed", "another kind"],
)
def test_a_damaged_file_is_refused_by_path(tmp_path, damage):
    path = tmp_path / FILE
    save_masks(MASKS, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=FILE):
        MaskFile(path)


def test_a_missing_file_is_refused_by_path(tmp_path):
    with pytest.raises(UserError, match=FILE):
        MaskFile(tmp_path / FILE)


def test_a_file_of_weights_is_no_file_of_masks(tmp_path):
    (tmp_path / FILE).parent.mkdir()
    save_file({"w": torch.zeros(2, 3)}, tmp_path / FILE)
    with pytest.raises(UserError, match=FILE):
        MaskFile(tmp_path / FILE)


@pytest.mark.parametrize(
    ("packed", "columns"),
    [
        (torch.zeros(2, 3), "24"),
        (torch.zeros(2, 3, dtype=torch.uint8), "25"),
        (torch.zeros(2, 3, dtype=torch.uint8), "999999999999999999999"),
        (torch.zeros(2, 3, dtype=torch.uint8), "0"),
        (torch.zeros(2, 3, dtype=torch.uint8), "-24"),
        (torch.zeros(2, 3, dtype=torch.uint8), "many"),
        (torch.zeros(6, dtype=torch.uint8), "48"),
        (torch.zeros(2, 3, 1, dtype=torch.uint8), "8"),
    ],
)
def test_masks_of_absurd_kinds_and_sizes_are_refused_by_path(tmp_path, packed, columns):
    save_file({"w": packed}, tmp_path / "masks", metadata={"w": columns})
    with pytest.raises(UserError, match=str(tmp_path / "masks")):
        MaskFile(tmp_path / "masks")


def test_the_mask_file_of_version_0_1_is_read_if_there_is_no_other(tmp_path):
    save_masks(MASKS, tmp_path / "masks.safetensors")
    assert set(ModelDirectory(tmp_path).mask_file.columns) == set(MASKS)
    save_masks({}, tmp_path / FILE)
    assert not ModelDirectory(tmp_path).mask_file.columns
