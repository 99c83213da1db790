"""CUDA kernels of qmir::selective_scan_q in the simulator: the reference's bytes, and float64."""

from pathlib import Path

import pytest
import torch
from support.host_launcher import HostLauncher, needs_compiler
from support.integers import code_range, same_bytes
from support.scan_tables import from_kernel_table, kernel_table, mutated
from support.scans_q import Size, operands, scan_bound
from support.tolerances import SCAN_TABLE
from torch import Tensor

from qmir_ao.backend.cuda import selective_scan_q as module
from qmir_ao.backend.cuda.scan_chunks import chunk_steps, sequences
from qmir_ao.backend.cuda.scan_q import MAX_STATES, make_table, variant, variant_of
from qmir_ao.backend.cuda.selective_scan_q import launch_selective_scan_q
from qmir_ao.ops.selective_scan_q import ScanArgs, selective_scan_q_ref

pytestmark = needs_compiler

# Every number of states is compiled on its own, which takes seconds: few of them, many sizes.
SIZES: dict[str, Size] = {
    "one-step": (1, 1, 1, 3, 1),
    "one-tile": (2, 2, 33, 3, 16),
    "light": (1, 4, 72, 10, 64),
    "two-samples": (2, 3, 18, 10, 37),
    "wide-group": (1, 1, 65, 10, 41),
}
CHUNKED: dict[str, tuple[Size, int]] = {
    "odd": ((2, 1, 5, 3, 150), 7),
    "one-tile": ((1, 2, 33, 3, 95), 16),
    "two-blocks": ((1, 1, 18, 10, 300), 32),
    "last-of-one-step": ((2, 3, 7, 10, 97), 48),
    "more-than-eight": ((1, 1, 3, 3, 421), 24),
}


def assert_close(result: Tensor, args: ScanArgs) -> None:
    exact, allowed = scan_bound(args, computed=not variant_of(args).table)
    assert ((result - exact).abs() <= allowed).all()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_one_chunk_and_the_references_table_give_the_references_bytes(
    size: Size, bits: int
) -> None:
    args = operands(3, size, bits)
    table = kernel_table(args, variant_of(args))
    want = selective_scan_q_ref(*args)
    for seed in range(3):
        got = launch_selective_scan_q(HostLauncher(seed), *args, table=table)
        assert same_bytes(got, want), seed


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("size", "steps"), CHUNKED.values(), ids=CHUNKED)
def test_chunks_are_as_close_to_float64_as_the_reference(size: Size, steps: int, bits: int) -> None:
    args = operands(5, size, bits)
    results = [launch_selective_scan_q(HostLauncher(s), *args, steps=steps) for s in range(3)]
    assert_close(results[0], args)
    assert all(same_bytes(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("size", "bits"), [((1, 2, 33, 16, 70), 8), ((1, 2, 5, 64, 40), 4)], ids=["8-bit", "64-states"]
)
def test_computed_decays_are_close_to_float64(size: Size, bits: int) -> None:
    args = operands(3, size, bits)
    assert not variant_of(args).table
    for steps in (16, 64):
        assert_close(launch_selective_scan_q(HostLauncher(steps), *args, steps=steps), args)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("seed", [4, 7])  # 4: without D and delta_bias
def test_table_holds_delta_and_decays(per_sample: bool, softplus: bool, seed: int) -> None:
    args = operands(seed, (2, 2, 33, 3, 4), 4, per_sample, softplus)
    kind = variant_of(args)
    size = sequences(2, 2, 33, 4, kind.warps)
    table = make_table(HostLauncher(seed), "selective_scan_q", args, size, kind)
    got = from_kernel_table(table, 66, kind)
    want = from_kernel_table(kernel_table(args, kind), 66, kind)
    torch.testing.assert_close(got[..., -1], want[..., -1], rtol=SCAN_TABLE, atol=0.0)
    decays = torch.exp(got[..., -1:] * args.A.unsqueeze(1))
    torch.testing.assert_close(got[..., :-1], decays, rtol=SCAN_TABLE, atol=0.0)


@pytest.mark.parametrize("steps", [None, 16])
@pytest.mark.parametrize("per_sample", [True, False])
def test_without_softplus_and_optional_operands(per_sample: bool, steps: int | None) -> None:
    args = operands(4, (2, 2, 17, 3, 40), 4, per_sample, softplus=False)
    # A negative delta grows without bound.
    args = args._replace(delta_shift=args.delta_step * code_range(4)[0])
    table = kernel_table(args, variant_of(args))
    got = launch_selective_scan_q(HostLauncher(1), *args, steps=steps, table=table)
    want = selective_scan_q_ref(*args)
    if steps is None:
        assert same_bytes(got, want)
    else:
        torch.testing.assert_close(got, want)


def test_unsigned_codes_and_strided_input() -> None:
    args = operands(7, (2, 2, 5, 3, 21), 4)
    raised = {
        name: (getattr(args, name).int() + 8).to(torch.uint8) for name in ("delta", "u", "B", "C")
    }
    unsigned = args._replace(**raised, delta_quant_min=0, delta_quant_max=15)
    table = kernel_table(unsigned, variant_of(unsigned))
    got = launch_selective_scan_q(HostLauncher(2), *unsigned, table=table)
    assert same_bytes(got, selective_scan_q_ref(*unsigned))
    strided = args.u.transpose(0, 1).contiguous().transpose(0, 1)
    results = [
        launch_selective_scan_q(HostLauncher(2), *args._replace(u=u)) for u in (strided, args.u)
    ]
    assert same_bytes(*results)


def test_batch_mates_and_the_size_of_a_block_change_no_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = operands(5, (3, 2, 18, 3, 100), 4)
    whole = launch_selective_scan_q(HostLauncher(0), *args, steps=16)
    per_sample = [f for f in ScanArgs._fields if f not in ("A", "D") and "delta_b" not in f][:12]
    for i in range(3):
        alone = args._replace(**{name: getattr(args, name)[i : i + 1] for name in per_sample})
        got = launch_selective_scan_q(HostLauncher(i), *alone, steps=16)
        assert same_bytes(got, whole[i : i + 1])
    monkeypatch.setattr(module, "variant_of", lambda scan: variant_of(scan)._replace(warps=2))
    assert same_bytes(launch_selective_scan_q(HostLauncher(1), *args, steps=16), whole)


@pytest.mark.parametrize("steps", [None, 16])
def test_code_of_delta_out_of_range_is_refused(steps: int | None) -> None:
    args = operands(1, (2, 1, 4, 3, 40), 4)
    args.delta[1, 3, 20] = 100
    launch = HostLauncher(0)
    with pytest.raises(RuntimeError, match=r"selective_scan_q: delta holds codes outside -8\.\.7"):
        launch_selective_scan_q(launch, *args, steps=steps)
    # The error is not carried over to the next call.
    args.delta[1, 3, 20] = 7
    assert launch_selective_scan_q(launch, *args, steps=steps).isfinite().all()


@pytest.mark.parametrize("steps", [64, 16])
def test_code_of_delta_out_of_range_gives_nan_from_its_step_on(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = operands(1, (2, 1, 4, 3, 40), 4)
    args.delta[1, 3, 20] = -9
    monkeypatch.setattr("qmir_ao.backend.cuda.outside.require", lambda *_: None)
    bad = launch_selective_scan_q(HostLauncher(0), *args, steps=steps).isnan()
    assert bad[1, 3, 20:].all()
    assert int(bad.sum()) == 20


def test_empty_sequence_and_many_states() -> None:
    launch = HostLauncher(0)
    args = operands(3, (2, 1, 4, 3, 1), 4)
    empty = {name: getattr(args, name)[..., :0] for name in ("u", "delta", "B", "C")}
    assert launch_selective_scan_q(launch, *args._replace(**empty)).shape == (2, 4, 0)
    many = operands(3, (1, 1, 3, MAX_STATES + 1, 9), 4)
    assert same_bytes(launch_selective_scan_q(launch, *many), selective_scan_q_ref(*many))
    assert not launch.launched


MUTATIONS = {
    "the carry forgets the decays": (r"decays\[i\] \* h \+ ends\[i\]", "h + ends[i]"),
    "a tile does not wait for its loads": (r"load\(tile\);\s+block\.sync\(\);", "load(tile);"),
}


@pytest.mark.parametrize(("pattern", "replacement"), MUTATIONS.values(), ids=MUTATIONS)
def test_mutated_kernels_are_caught(pattern: str, replacement: str, tmp_path: Path) -> None:
    size = (1, 1, 5, 3, 95)
    args = operands(5, size, 4)
    folder = mutated(tmp_path, "selective_scan_q", pattern, replacement)
    exact, allowed = scan_bound(args, computed=False)
    caught = []
    for seed in range(4):
        try:
            got = launch_selective_scan_q(HostLauncher(seed, folder), *args, steps=16)
            caught.append(not ((got - exact).abs() <= allowed).all())
        except RuntimeError:  # garbage read as codes of delta
            caught.append(True)
    assert any(caught)


def test_every_variant_fits_its_multiprocessor() -> None:
    for states in range(1, MAX_STATES + 1):
        for codes in (4, 16, 32, 64, 256):
            kind = variant(states, codes)
            assert kind.shared(apply=True) <= 99 * 1024
            assert kind.shared(apply=False) < kind.shared(apply=True)
    for states, codes in ((10, 16), (16, 16), (16, 256)):
        kind = variant(states, codes)
        assert kind.warps == 8
        assert 2 * (kind.shared(apply=True) + 1024) <= 164 * 1024
    assert variant(16, 16).table
    assert not variant(16, 256).table


@pytest.mark.parametrize("length", [4096, 65536, 230400])
@pytest.mark.parametrize("per_group", [72, 360])
def test_one_sample_fills_a_large_gpu(per_group: int, length: int) -> None:
    steps = chunk_steps(4, per_group, length)
    size = sequences(1, 4, per_group, length, 8)
    assert size.row_steps == steps
    assert steps % 16 == 0
    assert size.slots * size.blocks >= min(1024, length // 64 * size.blocks)
    # Carries of 16 states take at most half the memory of the outputs.
    assert 2 * 16 * size.slots <= length // 2
