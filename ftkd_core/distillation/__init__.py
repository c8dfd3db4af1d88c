# SPDX-License-Identifier: Apache-2.0
"""FTKD: distillation of an offline teacher with future frames into a streaming student. Training only."""
