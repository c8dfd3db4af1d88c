# SPDX-License-Identifier: Apache-2.0
"""Message types of a bag, from the definitions in the bag; a topic that is not read needs no definition."""

from rosbags.interfaces import Connection, MessageDefinitionFormat
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from ftkd_core.errors import UserError
from ftkd_ros.bag.message_definitions import message_types

_IDL_SEPARATOR = "=" * 80 + "\n"


def store_of(connection: Connection) -> Typestore:
    """Return a type store with the type of a connection, from the bag's definition if it has one.

    Raises UserError for a type that neither the bag nor this package knows, for a format other than CDR, and
    if the definition does not have the recorded hash; `rosbags` raises its own errors for a bad definition.
    """
    name, definition = connection.msgtype, connection.msgdef
    encoding = getattr(connection.ext, "serialization_format", "cdr")
    if encoding != "cdr":
        raise UserError(
            f"{connection.topic} has messages in the format {encoding!r}; expected ROS 2 messages (cdr)"
        )
    if definition.format == MessageDefinitionFormat.NONE:
        if name not in message_types().fielddefs:
            raise UserError(
                f"{connection.topic} has the unknown type {name!r} and the bag has no definition of it"
            )
        return message_types()
    store = get_typestore(Stores.EMPTY)
    if definition.format == MessageDefinitionFormat.MSG:
        store.register(get_types_from_msg(definition.data, name))
    elif definition.data.startswith(f"{_IDL_SEPARATOR}IDL: "):
        for part in definition.data.split(_IDL_SEPARATOR)[1:]:
            store.register(get_types_from_idl(part.split("\n", 1)[1]))
    else:
        store.register(get_types_from_idl(definition.data))
    if connection.digest and store.hash_rihs01(name) != connection.digest:
        raise UserError(
            f"{connection.topic}: the definition of {name!r} in the bag does not have its recorded hash"
        )
    return store
