"""Base class of the records that are stored as JSON or TOML."""

import msgspec

__all__ = ["Record"]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frozen record that refuses unknown keys when it is decoded."""
