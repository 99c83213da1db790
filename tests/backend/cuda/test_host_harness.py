"""The simulator of CUDA kernels: it computes as a GPU does, and catches what a GPU forbids."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.host_launcher import HERE, HostKernelError, HostLauncher, needs_compiler
from torch import Tensor

pytestmark = needs_compiler

SEEDS = range(6)
THREADS = 64
BAD = HERE / "bad"


def backwards(x: Tensor) -> Tensor:
    return x.flip(0)


def same(x: Tensor) -> Tensor:
    return x


# What the kernel with QMIR_FIXED computes, and what the one without is caught by: a message, or
# None where only the results of some seed are wrong.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "missing_barrier": (backwards, None),
    "missing_second_barrier": (backwards, None),
    "missing_template_barrier": (backwards, None),
    "missing_syncwarp": (same, None),
    "missing_wait": (same, None),
    "unset_shared": (same, None),
    "block_order": (same, None),
    "last_vector": (same, None),
    "write_behind_the_end": (same, "behind the end of"),
    "read_behind_the_end": (same, "behind the end of"),
    "write_before_the_start": (same, "before"),
    "shared_index": (same, "array index out of bounds"),
    "dynamic_shared": (same, "behind the end of"),
    "shuffle_mask": (same, "lane 1[6-9] is not in its own mask|lane [23].* own mask"),
    "shuffle_source": (same, "which is not in the mask 0000ffff"),
    "early_return": (same, "has ended"),
    "divergent_barrier": (same, "divergent barrier: some threads wait in __syncthreads"),
    "deadlock": (same, "deadlock: the threads wait for each other"),
    "misaligned_vector": (same, "misaligned access"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One source with all kernels of `bad/`, which compiles much faster than many."""
    folder = tmp_path_factory.mktemp("bad")
    texts = [path.read_text() for path in sorted(BAD.glob("*.cu"))]
    (folder / "bad.cu").write_text("\n".join(texts))
    return folder


def run(folder: Path, name: str, seed: int, fixed: bool) -> tuple[Tensor, Tensor]:
    """Output of a kernel of `bad/`, and what it should be."""
    # 64 elements end where the forbidden page begins, 61 a little before.
    count = 64 if name == "read_behind_the_end" else 61
    x = torch.randn(count)
    y = torch.full_like(x, float("nan"))
    launch = HostLauncher(seed, folder)
    blocks = 2 if name == "block_order" else 1
    launch(
        "bad",
        f"qmir_{name}",
        (blocks, 1, 1),
        (THREADS // blocks, 1, 1),
        [x, y, count],
        shared=4 * THREADS if name == "dynamic_shared" else 0,
        defines={"QMIR_FIXED": 1} if fixed else {},
    )
    return y, CASES[name][0](x)


def test_every_bad_kernel_is_tested() -> None:
    assert set(CASES) == {path.stem for path in BAD.glob("*.cu")}


@pytest.mark.parametrize("name", CASES)
def test_the_repaired_kernel_passes(bad: Path, name: str) -> None:
    for seed in SEEDS:
        y, want = run(bad, name, seed, fixed=True)
        assert torch.equal(y, want), seed


@pytest.mark.parametrize("name", [name for name, (_, message) in CASES.items() if message])
def test_forbidden_accesses_and_waits_are_named(bad: Path, name: str) -> None:
    message = CASES[name][1]
    assert message is not None
    caught = 0
    for seed in SEEDS:
        try:
            run(bad, name, seed, fixed=False)
        except HostKernelError as error:
            assert f"qmir_{name} (seed {seed}): " in str(error)
            with pytest.raises(HostKernelError, match=message):
                raise error
            caught += 1
    assert caught >= len(SEEDS) / 2


@pytest.mark.parametrize("name", [name for name, (_, message) in CASES.items() if not message])
def test_missing_synchronization_gives_wrong_results(bad: Path, name: str) -> None:
    wrong = [not torch.equal(*run(bad, name, seed, fixed=False)) for seed in SEEDS]
    assert sum(wrong) >= len(SEEDS) / 2


def _probe(seed: int, kernel: str, args: list[object], blocks: int = 1, threads: int = 32) -> None:
    HostLauncher(seed, HERE)("probe", kernel, (blocks, 1, 1), (threads, 1, 1), args)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_tensor_core_products_equal_integer_products(bits: int, seed: int) -> None:
    depth, low = 256 // bits, -(2 ** (bits - 1))
    a = torch.randint(low, -low, (16, depth))
    b = torch.randint(low, -low, (depth, 8))
    start = torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)

    def words(x: Tensor) -> Tensor:
        fields = (x & (2**bits - 1)).reshape(-1, 8 // bits)
        return (fields << torch.arange(0, 8, bits)).sum(1).to(torch.uint8).view(torch.int32)

    d = start.clone()
    _probe(seed, f"qmir_probe_s{bits}", [words(a), words(b.T.contiguous()), d])
    assert torch.equal(d.long(), start + a @ b)


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_votes_and_bf16(seed: int) -> None:
    n = 5 * 128 - 7
    x = torch.cat([torch.randn(n - 3) * 100, torch.tensor([torch.inf, torch.nan, 1e-40])])
    x[0] = 1.00390625  # halfway between two bf16 numbers
    finite = torch.where(x.isfinite(), x, 0.0)
    sums, low, high = torch.empty(5).double(), torch.empty(20), torch.empty(20)
    half, back = torch.empty(n, dtype=torch.bfloat16), torch.empty(n)
    rows = torch.cat([finite, torch.zeros(7)]).reshape(20, 32)
    args: list[object] = [finite, sums, low, high, half.view(torch.int16), back, n]
    _probe(seed, "qmir_probe_sums", args, 5, 128)
    want = rows.reshape(5, 128).double().sum(1)
    assert torch.allclose(sums, want, rtol=1e-14, atol=1e-11)
    assert torch.equal(low, rows.amin(1)) and torch.equal(high, rows.amax(1))
    _probe(seed, "qmir_probe_sums", [x, *args[1:]], 5, 128)
    assert torch.equal(half.isnan(), x.isnan())
    assert torch.equal(half.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    assert torch.equal(back.nan_to_num(7.0), half.float().nan_to_num(7.0))


def test_sums_do_not_depend_on_the_order_of_threads() -> None:
    found = []
    for seed in SEEDS:
        torch.manual_seed(0)
        x, sums = torch.randn(128), torch.empty(1).double()
        rest = [torch.empty(4), torch.empty(4), torch.empty(128).short(), torch.empty(128)]
        _probe(seed, "qmir_probe_sums", [x, sums, *rest, 128], 1, 128)
        found.append(float(sums))
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": [torch.zeros(4), torch.zeros(4), 1.5]}, "takes arguments ppl, got ppf"),
        (
            {"kernel": "qmir_other"},
            "no kernel qmir_other; there are: qmir_.*, qmir_missing_barrier",
        ),
        ({"shared": 2**20}, "bytes of shared memory"),
    ],
)
def test_a_wrong_launch_is_refused(bad: Path, change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "kernel": "qmir_missing_barrier",
        "grid": (1, 1, 1),
        "block": (THREADS, 1, 1),
        "args": [torch.zeros(4), torch.zeros(4), 4],
    }
    with pytest.raises(HostKernelError, match=message):
        HostLauncher(0, bad)("bad", **(given | change))  # type: ignore[arg-type]


def test_a_block_beyond_its_launch_bounds_is_refused() -> None:
    with pytest.raises(HostKernelError, match="256 threads, its __launch_bounds__ are 128"):
        _probe(0, "qmir_probe_sums", [None] * 6 + [0], 1, 256)


def test_sources_are_found_relative_to_the_package(tmp_path: Path) -> None:
    (tmp_path / "odd.cu").write_text('#include "no_such_header.cuh"\n')
    with pytest.raises(Exception, match=r"odd\.cu:1 includes 'no_such_header\.cuh'"):
        HostLauncher(0, tmp_path)("odd", "qmir_odd", (1, 1, 1), (1, 1, 1), [])
