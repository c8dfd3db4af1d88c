# SPDX-License-Identifier: Apache-2.0
"""Errors caused by user input."""


class UserError(ValueError):
    """Invalid user input; the message is one sentence: the value, the expected values, and the remedy.

    Command-line tools print the message and exit with code 2; nodes log it and keep running.
    """
