"""bcc, in a process of its own: the only module that imports it.

What bcc brings along is LLVM, of which a daemon has no use once its program is loaded. clang also writes to descriptor
2, changes the process's directory, and ends the process when it meets a mistake of its own.

The process is told what to compile on its standard input, and answers on its standard output, both in JSON.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xdplb.dataplane import btf, bundle, syscall
from xdplb.errors import CompileError, NotCapable, NotPrivileged

_HERE = str(Path(__file__).resolve().parents[2])
_PROGRAM = (
    "import json, sys; asked = json.load(sys.stdin); sys.path[:] = asked.pop('path'); "
    "from xdplb.dataplane.compiler import main; main(**asked)"
)
_LIBRARIES = ("libbcc.so.0", "libclang-cpp.so*", "libLLVM*.so*")
_OTHERS = {"c": "S1", "?": "b1"}
_PR_SET_PDEATHSIG = 1


class NoCompiler(NotCapable):
    """bcc is not there."""


def identity() -> str:
    """Tells this host's bcc and clang apart from others. They need not be loaded for that."""
    spec = importlib.util.find_spec("bcc")
    files = [Path(spec.origin)] if spec is not None and spec.origin is not None else []
    files += [file.with_name("version.py") for file in files]
    architecture = sysconfig.get_config_var("MULTIARCH") or "."
    for place in ("/usr/lib", "/usr/lib64", "/usr/local/lib", f"/usr/lib/{architecture}"):
        for pattern in _LIBRARIES:
            files += sorted(Path(place).glob(pattern))
    told = hashlib.sha256()
    for file in files:
        with suppress(OSError):
            status = file.stat()
            told.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return told.hexdigest()[:16]


def compile_xdp(source: str, flags: Sequence[str], functions: Sequence[str]) -> str:
    """JSON of what `compiled.Compiled` reads. CompileError with clang's words, NoCompiler where bcc is not there."""
    answer, said = _ask(source=source, flags=flags, functions=functions)
    if "compiled" in answer:
        return json.dumps(answer["compiled"] | {"compiler": identity()})
    if "missing" in answer:
        raise NoCompiler(*answer["missing"])
    raise failure(answer.get("error", "the compiler ended without a word"), said)


def rejection(source: str, flags: Sequence[str], function: str) -> str:
    """What the verifier says of a function, with lines of the source between. It may say nothing."""
    answer, said = _ask(source=source, flags=flags, functions=[function], load=True)
    return said if "error" in answer else ""


def failure(problem: str, said: str = "") -> CompileError | NotPrivileged:
    """`said` are the words of clang or the verifier, in which the problem stands last or is called an error."""
    if os.geteuid() != 0 and ("not permitted" in said or "not permitted" in problem):
        return NotPrivileged("the kernel lets only root load BPF programs", "run xdplb with sudo")
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("processed ")]
    problem = next((line for line in lines if " error: " in line), lines[-1] if lines else problem)
    return CompileError(
        f"the BPF program could not be compiled and loaded: {problem.strip()}",
        "xdplb needs Linux 5.15 or later with CONFIG_BPF_SYSCALL and CONFIG_BPF_JIT",
        said,
    )


def _ask(**asked: Any) -> tuple[Mapping[str, Any], str]:
    """The answer of a process that compiles, and what clang says. In a session of its own: a Ctrl-C is ours alone."""
    question = json.dumps(asked | {"path": [_HERE, *sys.path]})
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PROGRAM],
        input=question,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        start_new_session=True,
        env={**os.environ, "BCC_KERNEL_SOURCE": str(bundle.kernel_directory())},
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        code = done.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return {"error": f"the compiler {how}"}, done.stderr
    return (answer if isinstance(answer, dict) else {}), done.stderr


def main(source: str, flags: Sequence[str], functions: Sequence[str], load: bool = False) -> None:
    """The process that compiles. It ends when the one that asked has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        json.dump(_answer(source, flags, functions, load), answers)
    os._exit(0)  # LLVM takes its time to clean up


def _answer(source: str, flags: Sequence[str], functions: Sequence[str], load: bool) -> dict[str, Any]:
    try:
        import bcc
    except (ImportError, OSError) as error:  # the latter: of the library beneath
        return {
            "missing": (
                f"bcc's Python module is missing ({error})",
                "install the distribution's package (apt-get install python3-bpfcc) and run xdplb with the "
                "distribution's python3, in a virtual environment made with --system-site-packages; PyPI's 'bcc' is an "
                "unrelated package",
            )
        }
    if not hasattr(bcc, "BPF"):
        return {
            "missing": (
                f"the module bcc at {bcc.__file__} is not the BPF Compiler Collection",
                "pip uninstall bcc; apt-get install python3-bpfcc",
            )
        }
    try:
        made = bcc.BPF(text=source.encode(), cflags=list(flags))
        if load:
            for name in functions:
                made.load_func(name.encode(), bcc.BPF.XDP)
        return {"compiled": _compiled(bcc, made, functions)}
    except Exception as error:  # bcc raises nothing narrower
        return {"error": str(error)}


def _compiled(bcc: Any, made: Any, functions: Sequence[str]) -> dict[str, Any]:
    """bcc has made the maps that it knows of: their descriptors stand in the instructions, and are replaced here."""
    library, module = bcc.lib, ctypes.c_void_p(made.module)
    library.bpf_table_name.restype = ctypes.c_char_p
    data = next(map(syscall.btf_data, _descriptors_of_btf()), b"")
    types = btf.names(data)
    places, maps = {}, []
    for place in range(library.bpf_num_tables(module)):
        at = ctypes.c_size_t(place)
        name = library.bpf_table_name(module, at)
        places[library.bpf_table_fd_id(module, at)] = place
        size = library.bpf_table_leaf_size_id(module, at)
        definition = [
            library.bpf_table_type_id(module, at),
            library.bpf_table_key_size_id(module, at),
            size,
            library.bpf_table_max_entries_id(module, at),
            library.bpf_table_flags_id(module, at),
        ]
        kind = bcc.BPF._decode_table_type(json.loads(library.bpf_table_leaf_desc(module, name)))
        layout = _layout(kind) if ctypes.sizeof(kind) == size else None  # bcc forgets dimensions of arrays
        maps.append(
            {
                "name": name.decode(),
                "definition": definition,
                "layout": layout,
                "types": btf.members(data, types.get((btf.STRUCT, f"____btf_map_{name.decode()}"))),
            }
        )
    programs = {name: _with_places(made.dump_func(name.encode()), places) for name in functions}
    return {
        "maps": maps,
        "programs": {name: base64.b64encode(code).decode() for name, code in programs.items()},
        "btf": base64.b64encode(data).decode(),
        "functions": {name: types[btf.FUNCTION, name] for name in functions if (btf.FUNCTION, name) in types},
    }


def _descriptors_of_btf() -> Iterator[int]:
    """bcc loads it and keeps it open, but hands it to nobody."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(entry.readlink()) == "anon_inode:btf":
                yield int(entry.name)


def _with_places(instructions: bytes, places: Mapping[int, int]) -> bytes:
    code = bytearray(instructions)
    for at in range(0, len(code), 8):
        if code[at] == 0x18 and code[at + 1] >> 4 == 1:
            code[at + 4 : at + 8] = places[int.from_bytes(code[at + 4 : at + 8], "little")].to_bytes(4, "little")
    return bytes(code)


def _layout(kind: Any) -> Any:
    """A ctypes class in the form that `compiled` reads."""
    if issubclass(kind, ctypes.Array):
        return [_layout(kind._type_), kind._length_]
    if issubclass(kind, ctypes.Structure | ctypes.Union):
        fields = [[name, getattr(kind, name).offset, _layout(of)] for name, of in kind._fields_]
        return {"size": ctypes.sizeof(kind), "fields": fields}
    code: str = kind._type_
    return _OTHERS.get(code) or f"<{'u' if code.isupper() else 'i'}{ctypes.sizeof(kind)}"
