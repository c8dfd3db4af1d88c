# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: what they print is measured where they run; committed results say on which machine."""
