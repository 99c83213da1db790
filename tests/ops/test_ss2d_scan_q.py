"""qmir::ss2d_scan_q: the bytes of four plain integer scans, each along its walk over the image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.integers import same_bytes, seeds, with_threads
from support.scans_q import IMAGES, ImageSize, image_operands, walked
from torch import Tensor

import qmir_ao.backend.cpu.ss2d_scan_q  # noqa: F401  (registers the kernel)
from qmir_ao.ops.selective_scan_q import ScanArgs
from qmir_ao.ops.ss2d_scan_q import ss2d_scan_q, ss2d_scan_q_ref

sizes = st.tuples(
    st.integers(1, 2), st.integers(1, 20), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)
)
widths = st.sampled_from([2, 4, 8])


@settings(max_examples=150)
@given(seeds, sizes, widths, st.booleans())
def test_kernel_and_reference_give_the_bytes_of_the_four_walks(
    seed: int, size: ImageSize, bits: int, per_sample: bool
) -> None:
    args = image_operands(seed, size, bits, per_sample)
    want = walked(args)
    assert same_bytes(torch.ops.qmir.ss2d_scan_q(*args), want)
    assert same_bytes(ss2d_scan_q_ref(*args), want)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", IMAGES.values(), ids=IMAGES)
def test_named_sizes_give_the_bytes_of_the_four_walks(size: ImageSize, bits: int) -> None:
    args = image_operands(3, size, bits)
    result = torch.ops.qmir.ss2d_scan_q(*args)
    assert torch.isfinite(result).all()
    assert same_bytes(result, walked(args))


def test_threads_and_batch_mates_do_not_matter() -> None:
    args = image_operands(5, (3, 18, 10, 9, 12), 4)
    single = with_threads(1, lambda: torch.ops.qmir.ss2d_scan_q(*args))
    for count in (2, 3):
        assert same_bytes(with_threads(count, lambda: torch.ops.qmir.ss2d_scan_q(*args)), single)
    per_sample = [f for f in ScanArgs._fields if f not in ("A", "D") and "delta_b" not in f][:12]
    for i in range(3):
        alone = args._replace(**{name: getattr(args, name)[i : i + 1] for name in per_sample})
        assert same_bytes(torch.ops.qmir.ss2d_scan_q(*alone), single[i : i + 1])


def test_unsigned_codes_and_strided_input() -> None:
    args = image_operands(7, (2, 5, 4, 6, 7), 8)
    raised = {name: (getattr(args, name).int() + 128).to(torch.uint8) for name in ("delta", "u")}
    unsigned = args._replace(**raised, delta_quant_min=0, delta_quant_max=255)
    assert same_bytes(torch.ops.qmir.ss2d_scan_q(*unsigned), walked(unsigned))
    strided = args.u.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bytes(
        torch.ops.qmir.ss2d_scan_q(*args._replace(u=strided)), torch.ops.qmir.ss2d_scan_q(*args)
    )


@pytest.mark.parametrize("sides", [(0, 3), (3, 0)])
def test_empty_image(sides: tuple[int, int]) -> None:
    args = image_operands(3, (2, 4, 3, *sides), 4)
    assert torch.ops.qmir.ss2d_scan_q(*args).shape == (2, 4, *sides)


def test_wrapper_passes_everything_on() -> None:
    args = image_operands(3, (2, 4, 3, 5, 6), 4)
    result = ss2d_scan_q(
        args[:3], args[3:6], args.A, args[7:10], args[10:13], args.D, args.delta_bias,
        delta_quant_min=-8, delta_quant_max=7,
    )  # fmt: skip
    assert same_bytes(result, walked(args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 4, 5, 6)}, "u must hold int8 or uint8 codes"),
        ({"u": torch.zeros(2, 4, 5, dtype=torch.int8)}, r"u must be \(B, D, H, W\)"),
        ({"delta": torch.zeros(2, 12, 5, 6, dtype=torch.int8)}, r"delta must be \(B, 4\*D, H, W\)"),
        ({"B": torch.zeros(2, 4, 2, 5, 6, dtype=torch.int8)}, "B must be"),
        ({"A": torch.zeros(15, 3)}, "A must be"),
        ({"A": torch.zeros(16, 3).double()}, "A must be float32"),
        ({"D": torch.zeros(4)}, "D must be"),
        ({"u_step": torch.zeros(3)}, "u_step"),
        ({"delta": torch.full((2, 16, 5, 6), 100, dtype=torch.int8)}, "outside -8..7"),
    ],
)
def test_bad_operands_are_named(change: dict[str, Tensor], message: str) -> None:
    args = image_operands(3, (2, 4, 3, 5, 6), 4)._replace(**change)
    with pytest.raises(RuntimeError, match=f"qmir::ss2d_scan_q: .*{message}"):
        torch.ops.qmir.ss2d_scan_q(*args)
