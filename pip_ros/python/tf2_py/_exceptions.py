# SPDX-License-Identifier: Apache-2.0
"""Why there is no transform: one class for each reason, all of them `TransformException`."""


class TransformException(Exception):
    """The transform cannot be given."""


class ConnectivityException(TransformException):
    """The two frames are in different trees."""


class LookupException(TransformException):
    """A frame that was named does not exist."""


class ExtrapolationException(TransformException):
    """The buffer holds no data around the time asked for."""


class InvalidArgumentException(TransformException):
    """A frame's name is empty or begins with a slash."""


class TimeoutException(TransformException):
    """For `except` clauses: a buffer says why a transform is missing, not that waiting was in vain."""
