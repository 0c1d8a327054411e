# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.training`: training steps of presets side by side in one process, and of deep ones from shallow.

Apart from `python -m bench model`, which judges one mixer by shapes: here whole models of the paper are compared.
"""
