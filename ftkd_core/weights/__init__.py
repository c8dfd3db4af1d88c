# SPDX-License-Identifier: Apache-2.0
"""The shipped weights and their reader."""
