# SPDX-License-Identifier: Apache-2.0
"""A C++ compiler whose shared libraries share libstdc++ with torch, for AOTInductor packages.

Where a machine has `libstdc++.a` but no `libstdc++.so` for its linker, every package gets a libstdc++ of its own
without a word, and the process that loads it next to torch's dies of a segmentation fault.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = '#include <sstream>\nextern "C" int f(int x) { std::ostringstream s; s << x; return (int)s.str().size(); }\n'


def has_its_own_libstdcxx(library: bytes) -> bool:
    """Whether a shared library of C++ was linked with the archive: then it does not ask for the shared one by name."""
    return b"libstdc++.so.6" not in library


def shared_libstdcxx() -> Path:
    """The libstdc++ that this process has loaded, which is torch's."""
    import torch  # loads it

    assert torch.__version__
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libstdc++.so.6" in line:
            return Path(line.split(maxsplit=5)[5])
    raise RuntimeError("torch has loaded no libstdc++.so.6")


def compiler(folder: Path, cxx: str = "g++") -> str:
    """`cxx`, or where it would link the archive, a script around it that links the shared library first."""

    def links_the_archive(command: str) -> bool:
        (folder / "probe.cpp").write_text(SOURCE)
        made = folder / "probe.so"
        subprocess.run([command, "-shared", "-fPIC", folder / "probe.cpp", "-o", made], check=True)
        return has_its_own_libstdcxx(made.read_bytes())

    if not links_the_archive(cxx):
        return cxx
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\nexec {cxx} "$@" -Wl,--no-as-needed {shared_libstdcxx()}\n')
    script.chmod(0o755)
    if links_the_archive(str(script)):
        raise RuntimeError(f"{cxx} links libstdc++.a also where it is given {shared_libstdcxx()}")
    return str(script)
