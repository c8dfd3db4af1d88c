# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend."""


class UserError(ValueError):
    """Bad user input: one sentence that names the value, what was expected and what to do.

    Command-line tools print the sentence and exit with code 2; nodes log it and stay up.
    """
