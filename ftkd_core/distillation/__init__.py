# SPDX-License-Identifier: Apache-2.0
"""FTKD: what an offline teacher that sees the future hands to a streaming student. Training only."""
