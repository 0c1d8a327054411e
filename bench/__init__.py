# SPDX-License-Identifier: Apache-2.0
"""The benchmark CLI: `python -m bench --help`. Run from a checkout; not part of the installed package."""
