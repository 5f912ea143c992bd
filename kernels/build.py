"""Compile a Triton kernel ahead of time, for a target that need not be there, and read the result.

A `Variant` is a kernel with its compile-time choices; each kernel module lists its own in a tuple
`VARIANTS`, and `variants.py` joins them. `compile` gives what the machine code says: registers,
spills, local memory, how wide it reads and writes, instructions. `faults` holds that against what
the variant promises. Imports triton on use only; no GPU and no torch is needed.
"""

import importlib
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Name of each target: backend, architecture, threads of a warp.
TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
REGISTERS_MAX = 255  # of a thread; NVIDIA has no more
DIVISOR = 16  # what an aligned argument is a multiple of
# Of every kernel: a * b + c is rounded twice, as on the host, or codes would not be those of a CPU.
OPTIONS: Mapping[str, object] = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with everything chosen that the compiler wants to know.

    kernel: the `@triton.jit` function. signature: the type of each argument that is no constant
    (triton's names: "*i64", "*u8", "i32"). constants: its `tl.constexpr` arguments. aligned: the
    arguments that are multiples of 16 (addresses in bytes). elements: bf16 elements that one
    program handles; 0 where a loop hides it. load_bits, store_bits: the widest access to global
    memory must be at least this wide. targets: names of TARGETS; those that the kernel refuses are
    left out.
    """

    name: str
    kernel: Any  # triton's JITFunction has no types
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    elements: int = 0
    load_bits: int = 128
    store_bits: int = 128
    registers_max: int = REGISTERS_MAX
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True, slots=True)
class Built:
    """What the machine code of a variant says.

    registers: of a thread. spills: instructions that spill or fill (NVIDIA), registers spilled
    (AMD). local_bytes: of a thread's stack and local memory. shared_bytes: of a program. loads and
    stores: how many instructions access global memory with so many bits a thread. opcodes: how
    often each instruction stands in the code, without padding. seconds: what compiling took.
    """

    name: str
    target: str
    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    opcodes: Mapping[str, int]
    seconds: float

    @property
    def load_bits(self) -> int:
        """The widest load from global memory, in bits; 0 where there is none."""
        return max(self.loads, default=0)

    @property
    def store_bits(self) -> int:
        """The widest store to global memory, in bits; 0 where there is none."""
        return max(self.stores, default=0)

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())


def compile(variant: Variant, target: str) -> Built:
    """Compile `variant` for `target`, one of TARGETS, and read the machine code.

    Triton keeps what it built in its cache directory. Raises ValueError for an unknown target and
    for a variant whose arguments are not the kernel's, RuntimeError where triton only interprets
    (TRITON_INTERPRET), and triton's own errors for a kernel that does not compile.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r}, expected one of {', '.join(TARGETS)}")
    backend, arch, threads = TARGETS[target]
    start = time.perf_counter()
    made = machine(variant, backend, arch, threads)
    seconds = time.perf_counter() - start
    shared_bytes = int(made.metadata.shared)
    if backend == "cuda":
        usage, code = _disassembled(made.asm["cubin"])
        return _read_sass(variant.name, target, usage, code, shared_bytes, seconds)
    return _read_amdgcn(variant.name, target, made.asm["amdgcn"], shared_bytes, seconds)


def machine(variant: Variant, backend: str, arch: int | str, threads: int) -> Any:
    """Give what `triton.compile` makes of `variant` for a target that TARGETS need not have.

    Raises as `compile` does, which reads it; `launch.Bare` runs it.
    """
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    targets = importlib.import_module("triton.backends.compiler")
    if not isinstance(variant.kernel, triton.JITFunction):
        raise RuntimeError(
            f"{variant.name}: the kernel is a {type(variant.kernel).__name__}, expected what "
            "triton.jit makes: import it without TRITON_INTERPRET"
        )
    signature = _signature(variant)
    source = compiler.ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=dict(variant.constants),
        attrs={
            (list(signature).index(name),): [["tt.divisibility", DIVISOR]]
            for name in variant.aligned
        },
    )
    return triton.compile(
        source,
        target=targets.GPUTarget(backend, arch, threads),
        options={"num_warps": variant.num_warps, **OPTIONS},
    )


def faults(variant: Variant, built: Built) -> list[str]:
    """Say where `built` falls short of what `variant` promises, one line each."""
    found = []
    if built.spills:
        found.append(f"{built.spills} spills, expected none")
    if built.local_bytes:
        found.append(f"{built.local_bytes} bytes of local memory a thread, expected none")
    if built.registers > variant.registers_max:
        found.append(f"{built.registers} registers, expected at most {variant.registers_max}")
    if built.load_bits < variant.load_bits:
        found.append(f"loads of {built.load_bits} bits at most, expected {variant.load_bits}")
    if built.store_bits < variant.store_bits:
        found.append(f"stores of {built.store_bits} bits at most, expected {variant.store_bits}")
    return [f"{variant.name} for {built.target}: {each}" for each in found]


def instructions_per_element(variant: Variant, built: Built) -> float | None:
    """Return the instructions of the code for each bf16 element, lane by lane; None for a loop.

    Every instruction counts once: more than is executed where branches are not taken. AMD's scalar
    instructions, done once for a whole warp beside the others, are left out.
    """
    if not variant.elements:
        return None
    threads = TARGETS[built.target][2] * variant.num_warps
    lanes = sum(count for name, count in built.opcodes.items() if not name.startswith("s_"))
    return lanes * threads / variant.elements


def _signature(variant: Variant) -> dict[str, str]:
    """Give the type of every argument, in the kernel's order."""
    names = variant.kernel.arg_names
    given = {**variant.signature, **dict.fromkeys(variant.constants, "constexpr")}
    wrong = set(given) ^ set(names) | (set(variant.aligned) - set(variant.signature))
    if wrong:
        raise ValueError(
            f"{variant.name}: {', '.join(sorted(wrong))} missing, unknown, or aligned but no "
            f"argument; the kernel takes {', '.join(names)}"
        )
    return {name: given[name] for name in names}


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Give resource usage and machine code of a cubin, by the tools that triton brings."""
    tools = importlib.import_module("triton").knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tools.cuobjdump.path, "--dump-resource-usage", str(path))
        return usage, _run(tools.nvdisasm.path, "-c", str(path))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.M)
SASS_LOADS = ("LDG", "LDGSTS", "LD")
SASS_STORES = ("STG", "ST")
SASS_SPILLS = ("LDL", "STL")
AMDGCN = re.compile(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)", re.M)
AMD_MEMORY = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")


def _read_sass(
    name: str, target: str, usage: str, code: str, shared_bytes: int, seconds: float
) -> Built:
    whole = Counter(each for each in SASS.findall(code) if each != "NOP")
    opcodes: Counter[str] = Counter()
    for opcode, count in whole.items():
        opcodes[opcode.partition(".")[0]] += count
    assert opcodes  # the listing is of the form that is expected here
    return Built(
        name=name,
        target=target,
        registers=_number(r"\bREG:(\d+)", usage),
        spills=sum(opcodes[each] for each in SASS_SPILLS),
        local_bytes=_number(r"\bSTACK:(\d+)", usage) + _number(r"\bLOCAL:(\d+)", usage),
        shared_bytes=shared_bytes,
        loads=_widths((_sass_bits(op), n) for op, n in whole.items() if _is(op, SASS_LOADS)),
        stores=_widths((_sass_bits(op), n) for op, n in whole.items() if _is(op, SASS_STORES)),
        opcodes=dict(opcodes.most_common()),
        seconds=seconds,
    )


def _is(opcode: str, kinds: tuple[str, ...]) -> bool:
    return opcode.partition(".")[0] in kinds


def _sass_bits(opcode: str) -> int:
    """How much a thread moves: `LDG.E.128` has 128 bits, `STG.E.U8` 8, and `LDG.E` 32."""
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)
    return int(sizes[-1]) if sizes else 32


def _read_amdgcn(name: str, target: str, code: str, shared_bytes: int, seconds: float) -> Built:
    opcodes = Counter(each for each in AMDGCN.findall(code) if each != "s_nop")
    assert opcodes  # the listing is of the form that is expected here
    memory = [
        (match[1], _amd_bits(match[2]), count)
        for opcode, count in opcodes.items()
        if (match := AMD_MEMORY.match(opcode))
    ]
    return Built(
        name=name,
        target=target,
        registers=_number(r"\.vgpr_count:\s+(\d+)", code),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", code)
        + _number(r"\.sgpr_spill_count:\s+(\d+)", code),
        local_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        shared_bytes=shared_bytes,
        loads=_widths((bits, count) for verb, bits, count in memory if verb == "load"),
        stores=_widths((bits, count) for verb, bits, count in memory if verb == "store"),
        opcodes=dict(opcodes.most_common()),
        seconds=seconds,
    )


def _amd_bits(kind: str) -> int:
    """How much a thread moves: `dwordx4` has 128 bits, `ushort` 16, `ubyte` 8."""
    if words := re.search(r"dword(?:x(\d))?", kind):
        return 32 * int(words[1] or 1)
    return 16 if "short" in kind else 8


def _widths(found: Iterable[tuple[int, int]]) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for bits, count in found:
        counts[bits] += count
    return dict(sorted(counts.items(), reverse=True))


def _number(pattern: str, text: str) -> int:
    """Return the number that `pattern` finds; ValueError where the listing does not say it."""
    if found := re.search(pattern, text):
        return int(found[1])
    raise ValueError(f"nothing like {pattern} in the compiler's listing: {text[-300:]!r}")
