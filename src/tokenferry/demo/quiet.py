"""Keeps transformers from writing over our own progress bars."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Turns off the progress bars and notes of transformers in this process: several ranks share a terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
