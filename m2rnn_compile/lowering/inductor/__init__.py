# SPDX-License-Identifier: Apache-2.0
"""Fusion with the neighbours under `torch.compile`.

normalize.py   every call of the scan in one form
nodes.py       reading one node of a graph, whatever was called and however
obstacles.py   what must not be moved across: writes, changes of mode
match.py       what stands around a scan in an FX graph, and how far it can move into `m2rnn::fused_scan`
match_conv.py  the convolution in front of it
match_projection.py  whether all that the layer reads is columns of one tensor
pad_projection.py    and then, a width for it that fast products take
rewrite.py     puts the fused op in its place
hook.py        hands the rewrite to Inductor; the only file that touches the compiler's private parts
"""
