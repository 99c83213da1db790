"""qmir::pack and unpack on CUDA, run by the simulator."""

import pytest
import torch
from support.host_launcher import HostLauncher, needs_compiler
from support.variants import with_fault

from qmir_ao.backend.cuda.pack import launch_pack, launch_unpack
from qmir_ao.ops.pack import pack_ref

pytestmark = needs_compiler

COUNTS = [0, 1, 2, 3, 5, 15, 16, 17, 1000, 4097]


def random_codes(count: int, bits: int) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), dtype=torch.int8)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", COUNTS)
def test_kernels_equal_reference(count: int, bits: int) -> None:
    q = random_codes(count, bits)
    for seed in range(2):
        packed = launch_pack(HostLauncher(seed), q, bits)
        assert torch.equal(packed, pack_ref(q, bits))
        assert torch.equal(launch_unpack(HostLauncher(seed), packed, bits, count), q)


def test_higher_bits_are_cut_off_and_uint8_is_taken() -> None:
    q = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for bits in (2, 4, 8):
        assert torch.equal(launch_pack(HostLauncher(), q, bits), pack_ref(q, bits))


def test_strided_and_misaligned_codes() -> None:
    q = random_codes(105, 4)
    turned = q.reshape(5, 3, 7).permute(2, 0, 1)
    assert torch.equal(launch_pack(HostLauncher(), turned, 4), pack_ref(turned, 4))
    assert torch.equal(launch_pack(HostLauncher(), q[1:], 4), pack_ref(q[1:], 4))
    packed = pack_ref(q, 4)
    assert torch.equal(launch_unpack(HostLauncher(), packed[3:], 4, 99), q[6:])


def test_an_off_by_one_bound_is_noticed(tmp_path) -> None:
    right = "if (at + i < numel) codes[at + i] = mine[i];"
    folder = with_fault(tmp_path, "pack", right, right.replace("<", "<="))
    with pytest.raises(AssertionError, match="behind the end"):
        launch_unpack(HostLauncher(0, folder), pack_ref(random_codes(17, 4), 4), 4, 17)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(RuntimeError, match="container of 2, 4 or 8, got 3"):
        launch_pack(HostLauncher(), random_codes(4, 2), 3)
    with pytest.raises(RuntimeError, match="5 codes of 4 bits take 3 bytes, got 2"):
        launch_unpack(HostLauncher(), torch.zeros(2, dtype=torch.uint8), 4, 5)
