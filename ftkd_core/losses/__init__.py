# SPDX-License-Identifier: Apache-2.0
"""Matching and detection losses."""
