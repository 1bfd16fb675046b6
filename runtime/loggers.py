"""Loggers whose messages quote files, and can be printed as they are by a program of anyone."""

import logging

from latentforge.runtime.text import one_line, printable

__all__ = ["escaping_logger"]


def escaping_logger(name: str) -> logging.Logger:
    """Return the logger of this name, whose messages are one printable line whatever they quote."""
    logger = logging.getLogger(name)
    if _escape not in logger.filters:
        logger.addFilter(_escape)
    return logger


def _escape(record: logging.LogRecord) -> bool:
    """Put the escaped message in place of the record's, and let it pass."""
    text = record.getMessage()
    indent = text[: len(text) - len(text.lstrip(" "))]
    record.msg, record.args = indent + printable(one_line(text, limit=None)), None
    return True
