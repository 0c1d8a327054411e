# SPDX-License-Identifier: Apache-2.0
"""Packages share libstdc++ with torch also where the linker finds the archive only."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .toolchain import SOURCE, compiler, has_its_own_libstdcxx

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_a_usual_compiler_is_taken_as_it_is(tmp_path: Path) -> None:
    assert compiler(tmp_path) == "g++"


def test_a_compiler_that_finds_the_archive_only_is_given_the_shared_library(tmp_path: Path) -> None:
    archive = Path(subprocess.check_output(["g++", "-print-file-name=libstdc++.a"], text=True).strip())
    if not archive.is_absolute():
        pytest.skip("g++ has no libstdc++.a")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libstdc++.a").symlink_to(archive)
    poor = tmp_path / "poor-g++"
    poor.write_text(f'#!/bin/sh\nexec g++ -L{tmp_path / "lib"} "$@"\n')
    poor.chmod(0o755)
    (tmp_path / "x.cpp").write_text(SOURCE)
    subprocess.run([poor, "-shared", "-fPIC", tmp_path / "x.cpp", "-o", tmp_path / "x.so"], check=True)
    assert has_its_own_libstdcxx((tmp_path / "x.so").read_bytes()), "else this tests nothing"
    mended = compiler(tmp_path, str(poor))
    assert mended != str(poor)
    subprocess.run([mended, "-shared", "-fPIC", tmp_path / "x.cpp", "-o", tmp_path / "y.so"], check=True)
    assert not has_its_own_libstdcxx((tmp_path / "y.so").read_bytes())
