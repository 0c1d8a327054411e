# SPDX-License-Identifier: Apache-2.0
"""Builds kernel.cpp with the machine's C++ compiler at first use and keeps the result on disk.

The cache folder is $M2RNN_CACHE_DIR, else $XDG_CACHE_HOME/m2rnn_compile, else ~/.cache/m2rnn_compile; when it cannot be
written, a private temporary folder that lives as long as the process. The name of the library holds a hash of
everything that its code depends on (source, flags, compiler, CPU), so that a home folder shared by different machines
is safe; it appears under that name in one atomic step, so that any number of processes may build it at once.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILERS = ("g++", "clang++", "c++")
# NaN and infinity keep their IEEE meaning: no -ffast-math.
BASE_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# Tried in this order until one compiles and loads. Apple's clang, for one, has no -fopenmp.
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
BUILD_TIMEOUT_S = 300

_lock = threading.Lock()


class BuildError(RuntimeError):
    """The kernel cannot be had on this machine; the message says why and what to do."""


def cache_dir() -> Path:
    """The folder that compiled kernels are kept in (it may not exist yet)."""
    if path := os.environ.get("M2RNN_CACHE_DIR"):
        return Path(path).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "m2rnn_compile"


def find_compiler() -> list[str]:
    """The compiler as the start of a command line: $CXX (which may carry arguments), else the first one on PATH."""
    if cxx := os.environ.get("CXX"):
        command = shlex.split(cxx)
        if command and shutil.which(command[0]):
            return command
        raise BuildError(
            f"The C++ compiler named by CXX={cxx!r} was not found; set CXX to an existing compiler or unset it."
        )
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(
        f"No C++ compiler was found (looked for {', '.join(COMPILERS)} on PATH); install one, for example with "
        "`apt install g++` or `conda install gxx`, or set CXX to its path."
    )


def cpu_identity() -> str:
    """Tells apart CPUs for which -march=native may produce different code."""
    parts = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
        first: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                first.setdefault(name.strip(), value.strip())
        parts += [f"{name}={value}" for name, value in sorted(first.items())]
    except OSError:
        if platform.system() == "Darwin":
            parts.append(_output(["sysctl", "-n", "machdep.cpu.brand_string"]))
    return "\n".join(parts)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as e:
        return f"{type(e).__name__}: {e}"
    return done.stdout + done.stderr


def _writable_cache_dir() -> Path:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # os.access tells the wrong thing on some network file systems
            return folder
    except OSError:
        return _private_dir()


@functools.lru_cache(None)
def _private_dir() -> Path:
    """A folder nobody else can write to (a fixed name in /tmp would let others plant a library)."""
    folder = tempfile.mkdtemp(prefix="m2rnn_compile-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(command: list[str], target: Path) -> str | None:
    """Run the compiler and move its result to `target`. Returns what the compiler said when it failed."""
    handle, temporary = tempfile.mkstemp(prefix=target.stem + "-", suffix=".tmp.so", dir=target.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, str(SOURCE), "-o", temporary], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            return f"`{shlex.join(command)}` failed with exit code {done.returncode}: {said}"
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
        return None
    except (OSError, subprocess.SubprocessError) as e:
        return f"`{shlex.join(command)}` could not be run: {type(e).__name__}: {e}"
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.m2rnn_args_size.restype = ctypes.c_int
    for function in (library.m2rnn_forward, library.m2rnn_backward):
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_void_p]
    return library


def build() -> ctypes.CDLL:
    """Load the kernel, compiling it unless the cache holds it.

    Raises:
        BuildError: no compiler, or none of the flag sets compiles and loads.
    """
    if platform.system() == "Windows":
        raise BuildError("The C++ kernel is built for Linux and macOS only; use impl='eager', or WSL.")
    compiler = find_compiler()
    version = _output([*compiler, "--version"])
    fixed = "\0".join([SOURCE.read_text(), version, cpu_identity()])
    folder = _writable_cache_dir()
    failures: list[str] = []
    for optional in OPTIONAL_FLAGS:
        command = [*compiler, *BASE_FLAGS, *optional]
        digest = hashlib.sha256("\0".join([fixed, *command]).encode()).hexdigest()[:24]
        target = folder / f"m2rnn_cpu_{digest}.so"
        for cached in (target.exists(), False):
            if not cached:
                failure = _compile(command, target)
                if failure is not None:
                    failures.append(failure)
                    break
            try:
                return _load(target)
            except (OSError, AttributeError) as e:  # a damaged file in the cache is built anew
                if not cached:
                    failures.append(f"the library built by `{shlex.join(command)}` cannot be loaded: {e}")
                    break
    raise BuildError(
        "The C++ kernel could not be built; set CXX to a working C++17 compiler (GCC 9 or Clang 12 and later). "
        f"The last attempt: {failures[-1]}"
    )


@functools.lru_cache(None)
def _outcome() -> ctypes.CDLL | BuildError:
    try:
        return build()
    except BuildError as e:
        return e


def library() -> ctypes.CDLL:
    """The loaded kernel; builds it at the first call of the process. Raises BuildError."""
    with _lock:
        outcome = _outcome()
    if isinstance(outcome, BuildError):
        raise outcome
    return outcome


def availability() -> str | None:
    """None when the kernel can run on this machine (it is then built and loaded), otherwise why not.

    The answer is kept for the life of the process.
    """
    try:
        library()
    except BuildError as e:
        return str(e)
    return None


def reset() -> None:
    """Forget the outcome, so that the next call looks for a compiler again."""
    with _lock:
        _outcome.cache_clear()
