# SPDX-License-Identifier: Apache-2.0
"""The distillation experiment: protocol, matrix, scoring, diagnostics."""
