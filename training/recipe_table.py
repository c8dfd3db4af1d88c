# SPDX-License-Identifier: Apache-2.0
"""Comparison of the recipes with the public code."""


def comparison() -> str:
    """Return the comparison as Markdown."""
    return ""
