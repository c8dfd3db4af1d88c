# SPDX-License-Identifier: Apache-2.0
"""Streaming and offline detectors and their modules."""
