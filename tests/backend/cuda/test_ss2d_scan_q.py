"""CUDA kernels of qmir::ss2d_scan_q in the simulator: four walks over an image, read in place."""

from pathlib import Path

import pytest
import torch
from support.host_launcher import HostKernelError, HostLauncher, needs_compiler
from support.integers import same_bytes
from support.scan_roofline import PAGE, page
from support.scan_tables import kernel_table, mutated
from support.scans_q import ImageSize, image_bound, image_operands, walked
from torch import Tensor

from qmir_ao.backend.cuda import ss2d_scan_q as module
from qmir_ao.backend.cuda.scan_chunks import images
from qmir_ao.backend.cuda.scan_q import variant_of
from qmir_ao.backend.cuda.ss2d_scan_q import launch_ss2d_scan_q
from qmir_ao.ops.selective_scan_q import ScanArgs
from qmir_ao.ops.ss2d_scan_q import as_sequences

pytestmark = needs_compiler

SIZES: dict[str, ImageSize] = {
    "one-pixel": (1, 1, 3, 1, 1),
    "one-row": (2, 3, 3, 1, 40),
    "one-column": (1, 17, 3, 37, 1),
    "square": (1, 33, 3, 8, 8),
    "light": (2, 18, 10, 7, 9),
}
CHUNKED: dict[str, tuple[ImageSize, int]] = {
    "parts-of-columns": ((1, 5, 3, 40, 11), 16),
    "columns-side-by-side": ((2, 33, 3, 16, 19), 16),
    "several-columns-to-a-chunk": ((1, 3, 3, 5, 37), 23),
    "uneven-parts": ((1, 18, 10, 37, 9), 16),
    "one-row": ((1, 3, 3, 1, 70), 16),
    "one-column": ((1, 3, 3, 70, 1), 16),
    "longer-than-the-image": ((1, 3, 3, 6, 7), 100),
}


def assert_close(result: Tensor, args: ScanArgs) -> None:
    exact, allowed = image_bound(args, computed=not variant_of(args).table)
    assert ((result - exact).abs() <= allowed).all()


def reference_table(args: ScanArgs) -> Tensor:
    return kernel_table(as_sequences(args), variant_of(args))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_one_chunk_and_the_references_table_give_the_bytes_of_the_four_walks(
    size: ImageSize, bits: int
) -> None:
    args = image_operands(3, size, bits)
    table, want = reference_table(args), walked(args)
    assert images(*args.u.shape, 8).slots == 1
    for seed in range(3):
        assert same_bytes(launch_ss2d_scan_q(HostLauncher(seed), *args, table=table), want), seed


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("size", "steps"), CHUNKED.values(), ids=CHUNKED)
def test_chunks_are_as_close_to_float64_as_the_reference(size: ImageSize, steps: int) -> None:
    args = image_operands(5, size, 4)
    results = [launch_ss2d_scan_q(HostLauncher(seed), *args, steps=steps) for seed in range(3)]
    assert_close(results[0], args)
    assert all(same_bytes(results[0], other) for other in results[1:])


def test_computed_decays_are_close_to_float64() -> None:
    size = (1, 5, 16, 9, 13)
    args = image_operands(3, size, 8)
    assert not variant_of(args).table
    assert_close(launch_ss2d_scan_q(HostLauncher(0), *args, steps=16), args)


def test_batch_mates_and_the_size_of_a_block_change_no_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = image_operands(5, (3, 5, 3, 9, 12), 4)
    whole = launch_ss2d_scan_q(HostLauncher(0), *args, steps=16)
    per_sample = [f for f in ScanArgs._fields if f not in ("A", "D") and "delta_b" not in f][:12]
    for i in range(3):
        alone = args._replace(**{name: getattr(args, name)[i : i + 1] for name in per_sample})
        got = launch_ss2d_scan_q(HostLauncher(i), *alone, steps=16)
        assert same_bytes(got, whole[i : i + 1])
    monkeypatch.setattr(module, "variant_of", lambda scan: variant_of(scan)._replace(warps=4))
    assert same_bytes(launch_ss2d_scan_q(HostLauncher(1), *args, steps=16), whole)


def test_unsigned_codes_strided_input_and_absent_operands() -> None:
    args = image_operands(4, (2, 5, 3, 6, 7), 4, per_sample=False)
    raised = {
        name: (getattr(args, name).int() + 8).to(torch.uint8) for name in ("delta", "u", "B", "C")
    }
    unsigned = args._replace(**raised, delta_quant_min=0, delta_quant_max=15)
    got = launch_ss2d_scan_q(HostLauncher(2), *unsigned, table=reference_table(unsigned))
    assert same_bytes(got, walked(unsigned))
    strided = args.u.transpose(0, 1).contiguous().transpose(0, 1)
    results = [launch_ss2d_scan_q(HostLauncher(2), *args._replace(u=u)) for u in (strided, args.u)]
    assert same_bytes(*results)


@pytest.mark.parametrize("sides", [(0, 3), (3, 0)])
def test_empty_image(sides: tuple[int, int]) -> None:
    args = image_operands(3, (2, 4, 3, *sides), 4)
    assert launch_ss2d_scan_q(HostLauncher(0), *args).shape == (2, 4, *sides)


@pytest.mark.parametrize("steps", [None, 16])
def test_code_of_delta_out_of_range_is_refused(steps: int | None) -> None:
    args = image_operands(1, (2, 3, 3, 8, 9), 4)
    args.delta[1, 8, 2, 2] = 8
    with pytest.raises(RuntimeError, match=r"ss2d_scan_q: delta holds codes outside -8\.\.7"):
        launch_ss2d_scan_q(HostLauncher(0), *args, steps=steps)


MUTATIONS = {
    "columns do not wait for other warps": (r"if \(kImage && walk\.columns\)", "if (false)"),
    "backward walks go forward": (r"back\(kImage && group >= 2\)", "back(false)"),
}


@pytest.mark.parametrize(("pattern", "replacement"), MUTATIONS.values(), ids=MUTATIONS)
def test_mutated_kernels_are_caught(pattern: str, replacement: str, tmp_path: Path) -> None:
    args = image_operands(3, (1, 5, 3, 7, 9), 4)
    folder = mutated(tmp_path, "ss2d_scan_q", pattern, replacement)
    table, want = reference_table(args), walked(args)
    caught = []
    for seed in range(4):
        try:
            got = launch_ss2d_scan_q(HostLauncher(seed, folder), *args, table=table)
            caught.append(not same_bytes(got, want))
        except (HostKernelError, RuntimeError):
            caught.append(True)
    assert any(caught)


def test_the_page_of_predictions_is_up_to_date() -> None:
    assert PAGE.read_text() == page()
