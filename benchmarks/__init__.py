# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, each measured on the machine that runs them; committed results name their machine."""
