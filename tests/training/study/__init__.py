# SPDX-License-Identifier: Apache-2.0
"""Tests of the distillation study."""
