"""Every kernel compiles without a GPU: for Orin and Hopper, with the oldest and newest NVRTC."""

import re

import pytest
from support import kernel_table
from support.host_launcher import HERE
from support.nvrtc import (
    ARCHITECTURES,
    LIBRARIES,
    Compiled,
    CompileError,
    compile_text,
    needs_nvrtc,
    occupancy,
)

import qmir_ao.backend.cuda  # noqa: F401  (declares the variants)
from qmir_ao.backend.cuda import sources
from qmir_ao.backend.cuda.registration import dynamic_shared, variants

pytestmark = needs_nvrtc

CASES = [
    pytest.param(name, defines, id="-".join([name, *(f"{k}{v}" for k, v in defines.items())]))
    for name in sources.names()
    for defines in variants(name)
]
# JetPack 6.2's driver takes PTX up to this version.
ORIN_ISA = (8, 5)
ENTRY = re.compile(r"^\.visible \.entry (\w+)\(", re.MULTILINE)
PROBE = sources.flatten((HERE / "probe.cu").read_text(), "probe.cu", sources.folder() / "include")


def products(kernel: str, bits: int) -> str:
    """SASS name of the tensor-core product of so many bits, as Orin executes it."""
    return {4: "IMMA.16864.S4.S4", 8: "IMMA.16832.S8.S8"}[bits]


def check_resources(compiled: Compiled) -> None:
    entries = ENTRY.findall(compiled.ptx)
    assert entries and set(entries) == set(compiled.usage)
    assert len(compiled.cubin) > 0 and compiled.cubin[:4] == b"\x7fELF"
    for kernel, usage in compiled.usage.items():
        assert kernel.startswith("qmir_")
        assert usage.spilled == 0 and usage.registers <= 255, (kernel, usage)
        assert usage.shared <= 48 * 1024, (kernel, usage)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("version", LIBRARIES)
@pytest.mark.parametrize(("name", "defines"), CASES)
def test_kernels_compile_without_spills(
    name: str, defines: dict[str, int], version: str, architecture: str
) -> None:
    compiled = compile_text(version, sources.read(name), architecture, defines)
    check_resources(compiled)
    if version == "12.6":
        assert compiled.isa <= ORIN_ISA


@pytest.mark.parametrize(("name", "defines"), CASES)
def test_products_are_tensor_core_instructions(name: str, defines: dict[str, int]) -> None:
    """Whatever names 4 or 8 bits and calls a product holds the instruction that Orin executes."""
    compiled = compile_text("12.6", sources.read(name), "sm_87", defines)
    code = compiled.sass()
    assert set(code) == set(compiled.usage)
    for kernel, text in code.items():
        for bits, mnemonic in ((4, "m16n8k64"), (8, "m16n8k32")):
            ptx = compiled.ptx.split(f".entry {kernel}(", 1)[1].split(".entry", 1)[0]
            if mnemonic in ptx:
                assert products(kernel, bits) in text, kernel


@pytest.mark.parametrize("version", LIBRARIES)
def test_primitives_are_native_on_orin(version: str) -> None:
    compiled = compile_text(version, PROBE, "sm_87")
    check_resources(compiled)
    code = compiled.sass()
    assert products("", 8) in code["qmir_probe_s8"]
    assert products("", 4) in code["qmir_probe_s4"]
    assert "LDGSTS" in code["qmir_probe_s4"] and "LDSM" in code["qmir_probe_s4"]
    hopper = compile_text(version, PROBE, "sm_90").sass()
    assert products("", 8) in hopper["qmir_probe_s8"]
    assert products("", 4) not in hopper["qmir_probe_s4"]  # emulated there


def test_a_spill_would_be_seen() -> None:
    text = """
    extern "C" __global__ void __launch_bounds__(1024, 2) qmir_spills(const float* x, float* y) {
      float all[96];
      for (int i = 0; i < 96; ++i) all[i] = x[i * 1024 + threadIdx.x];
      for (int k = 0; k < 96; ++k)
        for (int i = 0; i < 96; ++i) all[i] = all[i] * all[(i + 1) % 96] + all[(i + 7) % 96];
      float sum = 0.0f;
      for (int i = 0; i < 96; ++i) sum += all[i];
      y[threadIdx.x] = sum;
    }
    """
    with pytest.raises(AssertionError, match="spilled"):
        check_resources(compile_text("12.6", text, "sm_87"))


def test_a_refused_source_shows_the_messages() -> None:
    with pytest.raises(CompileError, match=r"sm_90[\s\S]*identifier .nothing. is undefined"):
        compile_text("13.5", 'extern "C" __global__ void qmir_x() { nothing; }', "sm_90")


def test_occupancy_of_known_kernels() -> None:
    # 256 threads of 64 registers: 4 blocks by registers, of 1536 threads (6 blocks) on Orin.
    assert occupancy("sm_87", 256, 64, 0) == pytest.approx(4 * 256 / 1536)
    assert occupancy("sm_87", 256, 32, 0) == 1.0
    # 100 KB a block: one on Orin, two on a Hopper.
    assert occupancy("sm_87", 128, 32, 100 * 1024) == pytest.approx(128 / 1536)
    assert occupancy("sm_90", 128, 32, 100 * 1024) == pytest.approx(256 / 2048)


def test_the_table_of_kernels_is_current() -> None:
    assert kernel_table.PAGE.read_text() == kernel_table.table(), "run `make kernels`"


def test_the_table_reads_threads_and_shared_memory() -> None:
    text = sources.read("selective_scan_backward")
    compiled = compile_text("12.6", text, "sm_87", {"QMIR_STATES": 4})
    assert kernel_table._threads(compiled, "qmir_scan_backward_f32") == 256
    declared = dynamic_shared("qmir_scan_backward_f32", {"QMIR_STATES": 4})
    assert 48 * 1024 < declared <= 163 * 1024
    assert dynamic_shared("qmir_scan_columns", {"QMIR_STATES": 4}) == 0
