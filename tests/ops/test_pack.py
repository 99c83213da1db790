"""Packing: identity, layout, kernel against reference, bad arguments."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import qmir_ao.backend.cpu.pack  # noqa: F401  (registers the kernels)
from qmir_ao.backend.cpu.registration import KERNELS
from qmir_ao.ops.pack import pack, pack_ref, packed_bytes, unpack, unpack_ref

QMIR = torch.ops.qmir


@hypothesis.given(
    bits=st.sampled_from([2, 4, 8]), count=st.integers(0, 4000), seed=st.integers(0, 2**16)
)
@hypothesis.settings(max_examples=200)
def test_unpack_inverts_pack(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), generator=generator)
    q = q.to(torch.int8)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(count, bits),)
    assert torch.equal(packed, pack_ref(q, bits))
    assert torch.equal(unpack(packed, bits, count), q)
    assert torch.equal(unpack_ref(packed, bits, count), q)


def test_layout_is_little_end_first():
    four = torch.tensor([1, -1, 7], dtype=torch.int8)
    assert pack(four, 4).tolist() == [0xF1, 0x07]
    two = torch.tensor([1, -2, 0, -1, 1], dtype=torch.int8)
    assert pack(two, 2).tolist() == [0b11_00_10_01, 0b01]


def test_a_flipped_bit_is_noticed():
    q = torch.randint(-8, 8, (33,), dtype=torch.int8)
    packed = pack(q, 4)
    packed[5] ^= 0b0001_0000
    assert not torch.equal(unpack(packed, 4, 33), q)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_any_shape_and_poisoned_buffers(bits, poisoned_empty):
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 3, 7), dtype=torch.int8)
    turned = q.permute(2, 0, 1)
    assert torch.equal(unpack(pack(turned, bits), bits, 105), turned.reshape(-1))


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(RuntimeError, match=f"container of 2, 4 or 8, got {bits}"):
        pack(torch.zeros(4, dtype=torch.int8), bits)


def test_wrong_length_is_refused():
    with pytest.raises(RuntimeError, match="5 codes of 4 bits take 3 bytes, got 2"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)


def test_the_kernel_is_registered():
    assert "unpack" in KERNELS
