# SPDX-License-Identifier: Apache-2.0
"""Synchronization: camera messages -> rounds of N cameras."""
