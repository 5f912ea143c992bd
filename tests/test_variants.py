"""Every Triton variant compiles for every target to code that neither spills nor moves narrowly."""

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kvengine.kernels import build
from kvengine.kernels.build import TARGETS, Built, Variant

ROOT = Path(__file__).resolve().parent.parent

# Two kernels that the gate must refuse: one holds more values than a thread has registers for, one
# reads words that lie apart. And one that adds products.
PLANTED = """
import triton
import triton.language as tl

@triton.jit
def greedy_kernel(source_ptr, target_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    a = tl.load(source_ptr + offs)
    b = tl.load(source_ptr + COUNT + offs)
    c = tl.load(source_ptr + 2 * COUNT + offs)
    tl.debug_barrier()
    tl.store(target_ptr + offs, a * b + c)
    tl.store(target_ptr + COUNT + offs, a + b * c)
    tl.store(target_ptr + 2 * COUNT + offs, a - b * c)

@triton.jit
def strided_kernel(source_ptr, target_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    tl.store(target_ptr + offs, tl.load(source_ptr + offs * 64))

@triton.jit
def spread_kernel(source_ptr, target_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    high, low = tl.load(source_ptr + offs), tl.load(source_ptr + COUNT + offs)
    tl.store(target_ptr + offs, high * (1.0 / 15.0) - low * (1.0 / 15.0))
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What triton builds here is built anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def listed(require: Callable[[str], ModuleType]) -> tuple[Variant, ...]:
    require("torch")
    require("triton")
    return tuple(require("kvengine.kernels.variants").VARIANTS)


@pytest.fixture(scope="module")
def compiled() -> Callable[[Variant, str], Built]:
    """Compile, once for each variant and target."""
    kept: dict[tuple[str, str], Built] = {}

    def compiled(variant: Variant, target: str) -> Built:
        place = (variant.name, target)
        if place not in kept:
            kept[place] = build.compile(variant, target)
        return kept[place]

    return compiled


@pytest.fixture(scope="module")
def planted(
    require: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> ModuleType:
    require("triton")
    path = tmp_path_factory.mktemp("planted") / "planted_kernels.py"
    path.write_text(PLANTED)
    spec = importlib.util.spec_from_file_location("planted_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def greedy(planted: ModuleType) -> Variant:
    return Variant(
        "greedy",
        planted.greedy_kernel,
        signature={"source_ptr": "*fp32", "target_ptr": "*fp32"},
        constants={"COUNT": 1 << 14},
        aligned=("source_ptr", "target_ptr"),
        num_warps=1,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_without_spills(
    target: str, listed: tuple[Variant, ...], compiled: Callable[[Variant, str], Built]
) -> None:
    found = []
    for variant in listed:
        if target in variant.targets:
            found += build.faults(variant, compiled(variant, target))
    assert found == []


def test_names_are_unique_and_targets_known(listed: tuple[Variant, ...]) -> None:
    assert len({variant.name for variant in listed}) == len(listed) > 0
    for variant in listed:
        assert variant.targets and set(variant.targets) <= set(TARGETS)


def test_every_kernel_is_listed(listed: tuple[Variant, ...]) -> None:
    """A kernel that is in no variant is never compiled before a GPU sees it."""
    kernels = {variant.kernel.__name__ for variant in listed}
    found = {
        f"{path.name}: {node.name}"
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any(ast.unparse(each).startswith("triton.jit") for each in node.decorator_list)
        and node.name not in kernels
    }
    assert not found, "list them in their module's VARIANTS, and the module in kernels/variants.py"


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_that_spills_is_refused(target: str, planted: ModuleType) -> None:
    built = build.compile(greedy(planted), target)
    assert built.spills > 0
    assert built.local_bytes > 0
    found = " | ".join(build.faults(greedy(planted), built))
    assert f"greedy for {target}: {built.spills} spills" in found
    assert f"{built.local_bytes} bytes of local memory" in found


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_that_moves_narrowly_is_refused(target: str, planted: ModuleType) -> None:
    variant = Variant(
        "strided",
        planted.strided_kernel,
        signature={"source_ptr": "*i32", "target_ptr": "*i32"},
        constants={"COUNT": 1024},
        aligned=("source_ptr", "target_ptr"),
    )
    built = build.compile(variant, target)
    assert built.spills == built.local_bytes == 0
    (found,) = build.faults(variant, built)
    assert found == f"strided for {target}: loads of 32 bits at most, expected 128"


@pytest.mark.parametrize("target", TARGETS)
def test_copies_store_as_wide_as_their_addresses_allow(
    target: str, listed: tuple[Variant, ...], compiled: Callable[[Variant, str], Built]
) -> None:
    for variant in listed:
        if variant.kernel.__name__ == "copy_runs_kernel":
            built = compiled(variant, target)
            assert set(built.stores) == {variant.store_bits}, variant.name
            moved = variant.elements * 16
            threads = TARGETS[target][2] * variant.num_warps
            assert built.stores[variant.store_bits] * variant.store_bits * threads == moved


@pytest.mark.parametrize("target", TARGETS)
def test_products_are_rounded_before_they_are_added(target: str, planted: ModuleType) -> None:
    """The host rounds twice: int4's scales, cut off to bf16, would differ where both are exact."""
    variant = Variant(
        "spread",
        planted.spread_kernel,
        signature={"source_ptr": "*fp32", "target_ptr": "*fp32"},
        constants={"COUNT": 1024},
        aligned=("source_ptr", "target_ptr"),
    )
    found = build.compile(variant, target).opcodes
    assert not [opcode for opcode in found if re.match(r"FFMA|v_(pk_)?(fma|mac)", opcode)]
    assert [opcode for opcode in found if re.match(r"FMUL|v_(pk_)?mul_f32", opcode)]


def test_faults_name_each_promise() -> None:
    built = Built("x", "sm_90", 90, 3, 8, 0, {64: 1, 32: 9}, {}, {"LDG": 10, "EXIT": 6}, 0.1)
    variant = Variant("x", None, {}, registers_max=64, elements=128, num_warps=1)
    assert (built.load_bits, built.store_bits, built.instructions) == (64, 0, 16)
    assert build.instructions_per_element(variant, built) == 4
    assert build.faults(variant, built) == [
        "x for sm_90: 3 spills, expected none",
        "x for sm_90: 8 bytes of local memory a thread, expected none",
        "x for sm_90: 90 registers, expected at most 64",
        "x for sm_90: loads of 64 bits at most, expected 128",
        "x for sm_90: stores of 0 bits at most, expected 128",
    ]


def test_bad_input_is_named(planted: ModuleType) -> None:
    with pytest.raises(ValueError, match="target 'sm_10', expected one of sm_80"):
        build.compile(greedy(planted), "sm_10")
    kernel = planted.strided_kernel
    for signature, aligned, named in (
        ({"source_ptr": "*i32"}, (), "target_ptr"),
        ({"source_ptr": "*i32", "target_ptr": "*i32", "other": "i32"}, (), "other"),
        ({"source_ptr": "*i32", "target_ptr": "*i32"}, ("COUNT",), "COUNT"),
    ):
        variant = Variant("wrong", kernel, signature, {"COUNT": 64}, aligned)
        with pytest.raises(ValueError, match=f"^wrong: {named} .* takes source_ptr, target_ptr"):
            build.compile(variant, "sm_90")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        build.compile(Variant("plain", lambda: None, {}), "sm_90")
