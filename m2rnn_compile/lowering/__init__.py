# SPDX-License-Identifier: Apache-2.0
"""How the ops run. Each package here is imported by `ops/registry.py` when it is first needed."""
