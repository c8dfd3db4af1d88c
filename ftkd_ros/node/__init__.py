# SPDX-License-Identifier: Apache-2.0
"""The detector node and its parts."""
