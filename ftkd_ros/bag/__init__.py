# SPDX-License-Identifier: Apache-2.0
"""Tools for bags: convert, play, record, detect, evaluate, report."""
