# SPDX-License-Identifier: Apache-2.0
"""Exceptions of transform look-ups, one class per reason, all derived from `TransformException`."""


class TransformException(Exception):
    """The transform is not available."""


class ConnectivityException(TransformException):
    """The two frames are in different trees."""


class LookupException(TransformException):
    """A frame does not exist."""


class ExtrapolationException(TransformException):
    """The buffer has no data around the requested time."""


class InvalidArgumentException(TransformException):
    """A frame name is empty or begins with a slash."""


class TimeoutException(TransformException):
    """For `except` clauses only: after a timeout the buffer raises one of the other exceptions."""
