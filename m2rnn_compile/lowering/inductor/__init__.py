# SPDX-License-Identifier: Apache-2.0
"""Fusion with the neighbours under `torch.compile`.

normalize.py  every call of the scan in one form
match.py    what stands around a scan in an FX graph, and how far it can move into `m2rnn::fused_scan`
rewrite.py  puts the fused op in its place
hook.py     hands the rewrite to Inductor; the only file that touches the compiler's private parts
"""
